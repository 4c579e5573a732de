package main

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloudflare/tableflip"
)

const loopback = "127.0.0.1:0"

// A strange listener is of the program's own type.
type strange struct{ *net.TCPListener }

var scenes = map[string]func(*scene){
	// Listeners and sockets for packets.

	"what a listener is": func(s *scene) {
		s.new()
		ln := get(s.Listen("tcp", loopback))
		_, isTCP := ln.(*net.TCPListener)
		_, hasFile := ln.(interface{ File() (*os.File, error) })
		_, hasDeadline := ln.(interface{ SetDeadline(time.Time) error })
		_, isConn := ln.(syscall.Conn)
		s.say("*net.TCPListener %v, File %v, SetDeadline %v, SyscallConn %v", isTCP, hasFile, hasDeadline, isConn)
	},
	"what a packet conn is": func(s *scene) {
		s.new()
		c := get(s.ListenPacket("udp", loopback))
		_, isUDP := c.(*net.UDPConn)
		_, hasMethods := c.(interface {
			ReadMsgUDP(b, oob []byte) (n, oobn, flags int, addr *net.UDPAddr, err error)
			SyscallConn() (syscall.RawConn, error)
		})
		s.say("*net.UDPConn %v, its methods %v", isUDP, hasMethods)
	},
	"what a connection is": func(s *scene) {
		s.new()
		ln := get(s.Listen("tcp", loopback))
		s.ready()
		c := get(net.Dial("tcp", ln.Addr().String()))
		defer c.Close()
		_, isTCP := get(ln.Accept()).(*net.TCPConn)
		s.say("*net.TCPConn %v", isTCP)
	},
	"a copy by File": func(s *scene) {
		s.new()
		ln := get(s.Listen("tcp", loopback))
		f := get(ln.(interface{ File() (*os.File, error) }).File())
		s.say("the same address %v", get(net.FileListener(f)).Addr().String() == ln.Addr().String())
	},
	"Accept before Ready": func(s *scene) {
		s.new()
		s.say("%s", accepts(get(s.Listen("tcp", loopback))))
	},
	"Accept after the upgrade": func(s *scene) {
		s.new()
		ln := get(s.Listen("tcp", loopback))
		s.ready()
		if s.gen == 1 {
			s.await("over")
			return
		}
		must(s.upgrade())
		<-s.Exit()
		s.say("%s", accepts(ln))
		s.mark("over")
	},
	"a read before Ready": func(s *scene) {
		s.new()
		c := get(s.ListenPacket("udp", loopback))
		get(get(net.Dial("udp", c.LocalAddr().String())).Write([]byte("hello")))
		must(c.SetReadDeadline(time.Now().Add(shortly)))
		_, _, err := c.ReadFrom(make([]byte, 10))
		s.say("%s", outcome(err))
	},
	"a closed listener": generations(
		func(s *scene) { must(get(s.Listen("tcp", loopback)).Close()) },
		func(s *scene) {
			ln, err := s.Listener("tcp", loopback)
			s.say("%s", found(ln != nil, err))
		},
	),
	"Accept of a closed listener": func(s *scene) {
		s.new()
		ln := get(s.Listen("tcp", loopback))
		s.ready()
		failed := make(chan error)
		go func() {
			_, err := ln.Accept()
			failed <- err
		}()
		must(ln.Close())
		s.say("net.ErrClosed %v, Close again: %s", errors.Is(<-failed, net.ErrClosed), outcome(ln.Close()))
	},
	"a closed Unix listener": generations(
		func(s *scene) {
			must(get(s.Listen("unix", s.path("s"))).Close())
			s.say("its file is %s", s.exists("s"))
		},
		func(s *scene) {
			ln, err := s.Listener("unix", s.path("s"))
			s.say("%s, its file is %s", found(ln != nil, err), s.exists("s"))
		},
	),
	"a closed packet conn": generations(
		func(s *scene) {
			c := get(s.ListenPacket("udp", loopback))
			must(c.Close())
			_, _, err := c.ReadFrom(make([]byte, 1))
			s.say("net.ErrClosed %v, Close again: %s", errors.Is(err, net.ErrClosed), outcome(c.Close()))
		},
		func(s *scene) {
			c, err := s.PacketConn("udp", loopback)
			s.say("%s", found(c != nil, err))
		},
	),
	"a closed Unix packet conn": generations(
		func(s *scene) {
			must(get(s.ListenPacket("unixgram", s.path("s"))).Close())
			s.say("its file is %s", s.exists("s"))
		},
		func(s *scene) {
			c, err := s.PacketConn("unixgram", s.path("s"))
			s.say("%s, its file is %s", found(c != nil, err), s.exists("s"))
		},
	),
	"a packet conn closed during an upgrade that fails": func(s *scene) {
		s.new()
		switch {
		case noted("SECOND") != "":
			c, err := s.PacketConn("udp", loopback)
			s.say("%s", found(c != nil, err))
			s.ready()
		case s.gen == 1:
			s.mark("started")
			s.await("closed")
			os.Exit(1)
		default:
			c := get(s.ListenPacket("udp", loopback))
			s.ready()
			upgraded := make(chan error)
			go func() { upgraded <- s.upgrade() }()
			s.await("started")
			must(c.Close())
			s.mark("closed")
			failed := <-upgraded
			_, _, err := c.ReadFrom(make([]byte, 1))
			s.say("Upgrade: %s, net.ErrClosed %v", outcome(failed), errors.Is(err, net.ErrClosed))
			note("SECOND", "yes")
			must(s.upgrade())
		}
	},
	"port 0": generations(
		func(s *scene) { note("PORT", port(get(s.Listen("tcp", loopback)).Addr())) },
		func(s *scene) {
			s.say("the same port %v", port(get(s.Listen("tcp", loopback)).Addr()) == noted("PORT"))
		},
	),
	"port 0 twice": generations(
		func(s *scene) {
			note("A", port(get(s.Listen("tcp", loopback)).Addr()))
			note("B", port(get(s.Listen("tcp", loopback)).Addr()))
		},
		func(s *scene) {
			a, b := port(get(s.Listen("tcp", loopback)).Addr()), port(get(s.Listen("tcp", loopback)).Addr())
			s.say("both ports %v", a == noted("A") && b == noted("B"))
		},
	),
	"an address in other words": generations(
		func(s *scene) { note("PORT", port(get(s.Listen("tcp", loopback)).Addr())) },
		func(s *scene) {
			_, err := s.Listen("tcp", "127.0.0.1:"+noted("PORT"))
			s.say("%s", outcome(err))
		},
	),
	"several sockets of one address": func(s *scene) {
		reuse := func(_, _ string, c syscall.RawConn) error {
			return c.Control(func(fd uintptr) { must(syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, soReusePort, 1)) })
		}
		s.new(tableflip.Options{ListenConfig: &net.ListenConfig{Control: reuse}})
		if s.gen == 0 {
			ln := get(s.Listen("tcp", loopback))
			note("ADDRESS", ln.Addr().String())
			get(s.Listen("tcp", ln.Addr().String()))
			get(s.Listen("tcp", ln.Addr().String()))
			s.ready()
			must(s.upgrade())
			return
		}
		get(s.Listener("tcp", loopback))
		n := 0
		for get(s.Listener("tcp", noted("ADDRESS"))) != nil {
			n++
		}
		s.say("%d of 2", n)
		s.ready()
	},
	"a stale Unix socket": func(s *scene) {
		ln := get(net.Listen("unix", s.path("s")))
		ln.(*net.UnixListener).SetUnlinkOnClose(false)
		must(ln.Close())
		s.new()
		_, err := s.Listen("unix", s.path("s"))
		s.say("%s", outcome(err))
	},
	"an abstract Unix socket": generations(
		func(s *scene) { get(s.Listen("unix", "@"+filepath.Base(s.dir))) },
		func(s *scene) {
			ln, err := s.Listener("unix", "@"+filepath.Base(s.dir))
			s.say("%s", found(ln != nil, err))
		},
	),
	"sockets of other kinds": func(s *scene) {
		s.new()
		_, err1 := s.Listen("unixpacket", s.path("s"))
		_, err2 := s.Listen("unix", "")
		_, err3 := s.ListenPacket("udp", "224.0.0.251:0")
		_, err4 := s.Listen("peculiar", "name")
		s.say("%s %s %s %s", outcome(err1), outcome(err2), outcome(err3), outcome(err4))
	},
	"ListenConfig.Control": func(s *scene) {
		s.new(tableflip.Options{ListenConfig: &net.ListenConfig{Control: func(network, addr string, c syscall.RawConn) error {
			s.say("called with %s %s", network, addr)
			return nil
		}}})
		get(s.Listen("tcp", loopback))
		get(s.ListenPacket("udp", loopback))
		s.ready()
		if s.gen == 0 {
			must(s.upgrade())
		}
	},
	"ListenConfig.KeepAlive": func(s *scene) {
		s.new(tableflip.Options{ListenConfig: &net.ListenConfig{KeepAlive: -1}})
		ln := get(s.Listen("tcp", loopback))
		s.ready()
		c := get(net.Dial("tcp", ln.Addr().String()))
		defer c.Close()
		must(get(get(ln.Accept()).(*net.TCPConn).SyscallConn()).Control(func(fd uintptr) {
			on := get(syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_KEEPALIVE))
			s.say("keep-alive %v", on != 0)
		}))
		if s.gen == 0 {
			must(s.upgrade())
		}
	},
	"ListenWithCallback": generations(
		func(s *scene) {
			ln := get(s.ListenWithCallback("tcp", loopback, func(network, addr string) (net.Listener, error) {
				s.say("called with %s %s", network, addr)
				return net.Listen(network, addr)
			}))
			s.ready()
			s.say("%s", accepts(ln))
		},
		func(s *scene) {
			get(s.ListenWithCallback("tcp", loopback, func(string, string) (net.Listener, error) { return nil, fs.ErrInvalid }))
			s.say("not called")
		},
	),
	"ListenWithCallback with a type of the program's": generations(
		func(s *scene) {
			ln := get(s.ListenWithCallback("tcp", loopback, func(network, addr string) (net.Listener, error) {
				return strange{get(net.Listen(network, addr)).(*net.TCPListener)}, nil
			}))
			_, own := ln.(strange)
			s.say("it is returned %v, %s", own, accepts(ln))
		},
		func(s *scene) {
			ln, err := s.Listener("tcp", loopback)
			s.say("%s", found(ln != nil, err))
		},
	),
	"ListenWithCallback without a socket": func(s *scene) {
		s.new()
		_, err := s.ListenWithCallback("tcp", loopback, func(network, addr string) (net.Listener, error) {
			return struct{ net.Listener }{get(net.Listen(network, addr))}, nil
		})
		s.say("%s", outcome(err))
	},
	"ListenPacketWithCallback": generations(
		func(s *scene) {
			get(s.ListenPacketWithCallback("udp", "name", func(network, addr string) (net.PacketConn, error) {
				s.say("called with %s %s", network, addr)
				return net.ListenPacket(network, loopback)
			}))
		},
		func(s *scene) {
			c, err := s.PacketConn("udp", "name")
			s.say("%s", found(c != nil, err))
		},
	),

	// Adding and looking up.

	"replacing a file": generations(
		func(s *scene) {
			must(s.AddFile("f", s.file("a", "first")))
			must(s.AddFile("f", s.file("b", "second")))
		},
		func(s *scene) { s.say("the %s, and %d more", text(get(s.File("f"))), len(get(s.Files()))) },
	),
	"replacing a file that was handed on": generations(
		func(s *scene) { must(s.AddFile("f", s.file("a", "first"))) },
		func(s *scene) { must(s.AddFile("f", s.file("b", "second"))) },
		func(s *scene) { s.say("the %s, and %d more", text(get(s.File("f"))), len(get(s.Files()))) },
	),
	"replacing a file by a closed one": generations(
		func(s *scene) {
			must(s.AddFile("f", s.file("a", "first")))
			f := s.file("b", "second")
			must(f.Close())
			s.say("%s", outcome(s.AddFile("f", f)))
		},
		func(s *scene) { s.say("the %s", text(get(s.File("f")))) },
	),
	"replacing a file while upgrades fail": func(s *scene) {
		s.new()
		if s.gen == 1 {
			f, err := s.File("f")
			s.say("%s", found(f != nil, err))
			if noted("SECOND") == "" {
				os.Exit(1)
			}
			s.ready()
			return
		}
		f := s.file("a", "first")
		must(s.AddFile("f", f))
		s.ready()
		stop, stopped := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(stopped)
			for {
				select {
				case <-stop:
					return
				default:
					_ = s.AddFile("f", f) // is refused at times
				}
			}
		}()
		for range 9 {
			if s.upgrade() == nil {
				s.say("a successor that exits has taken over")
			}
		}
		note("SECOND", "yes")
		must(s.upgrade())
		close(stop)
		<-stopped
	},
	"replacing a listener": generations(
		func(s *scene) {
			a, b := get(net.Listen("tcp", loopback)), get(net.Listen("tcp", loopback))
			must(s.AddListener("tcp", "web", a.(*net.TCPListener)))
			must(s.AddListener("tcp", "web", b.(*net.TCPListener)))
			note("B", b.Addr().String())
		},
		func(s *scene) { s.say("the second %v", get(s.Listener("tcp", "web")).Addr().String() == noted("B")) },
	),
	"a listener that was replaced": generations(
		func(s *scene) {
			old, ln := get(s.Listen("tcp", loopback)), get(net.Listen("tcp", loopback))
			s.ready()
			must(s.AddListener("tcp", loopback, ln.(*net.TCPListener)))
			s.say("%s", accepts(old))
			must(old.Close())
			note("B", ln.Addr().String())
		},
		func(s *scene) {
			ln := get(s.Listener("tcp", loopback))
			again, err := s.Listener("tcp", loopback)
			s.say("the second %v, one more %s", ln.Addr().String() == noted("B"), found(again != nil, err))
		},
	),
	"a listener added under its own name": generations(
		func(s *scene) {
			ln := get(s.Listen("unix", s.path("s")))
			must(s.AddListener("unix", s.path("s"), ln.(tableflip.Listener)))
			s.ready()
			s.say("%s", accepts(ln))
		},
		func(s *scene) {
			ln, err := s.Listener("unix", s.path("s"))
			s.say("%s, its file is %s", found(ln != nil, err), s.exists("s"))
		},
	),
	"a copy of a listener added under its name": generations(
		func(s *scene) {
			ln := get(s.Listen("unix", s.path("s")))
			f := get(ln.(interface{ File() (*os.File, error) }).File())
			must(s.AddListener("unix", s.path("s"), get(net.FileListener(f)).(*net.UnixListener)))
		},
		func(s *scene) {
			ln, err := s.Listener("unix", s.path("s"))
			s.ready()
			must(s.WaitForParent(ctx()))
			s.say("%s, its file is %s", found(ln != nil, err), s.exists("s"))
		},
	),
	"replacing a packet conn": generations(
		func(s *scene) {
			get(s.ListenPacket("udp", loopback))
			c := get(net.ListenPacket("udp", loopback))
			must(s.AddPacketConn("udp", loopback, c.(*net.UDPConn)))
			note("B", c.LocalAddr().String())
		},
		func(s *scene) {
			s.say("the second %v", get(s.PacketConn("udp", loopback)).LocalAddr().String() == noted("B"))
		},
	),
	"a connected packet conn": generations(
		func(s *scene) {
			to := get(net.ListenPacket("udp", loopback))
			defer to.Close()
			must(s.AddPacketConn("udp", "peer", get(net.Dial("udp", to.LocalAddr().String())).(*net.UDPConn)))
		},
		func(s *scene) { must(get(s.PacketConn("udp", "peer")).Close()) },
		func(s *scene) {
			c, err := s.PacketConn("udp", "peer")
			s.say("%s", found(c != nil, err))
		},
	),
	"a file in three generations": generations(
		func(s *scene) { must(s.AddFile("f", s.file("a", "first"))) },
		func(s *scene) { must(get(s.File("f")).Close()) },
		func(s *scene) { s.say("the %s", text(get(s.File("f")))) },
	),
	"all files in three generations": generations(
		func(s *scene) {
			must(s.AddFile("a", s.file("a", "first")))
			must(s.AddFile("b", s.file("b", "second")))
			must(s.AddFile("", s.file("c", "unnamed")))
			must(s.AddFile("conn tcp :80", s.file("d", "no connection")))
			get(s.Listen("tcp", loopback))
			get(s.ListenPacket("udp", loopback))
			must(s.AddListener("tcp", "web", get(net.Listen("tcp", loopback)).(*net.TCPListener)))
		},
		func(s *scene) {
			for _, f := range get(s.Files()) {
				must(f.Close())
			}
			f, err := s.File("a")
			s.say("%s after Files", found(f != nil, err))
		},
		func(s *scene) {
			var all []string
			for _, f := range get(s.Files()) {
				all = append(all, text(f))
			}
			slices.Sort(all)
			s.say("%s", strings.Join(all, ", "))
		},
	),
	"a connection in three generations": generations(
		func(s *scene) {
			ln := get(net.Listen("tcp", loopback))
			must(s.AddConn("tcp", "client", get(net.Dial("tcp", ln.Addr().String())).(*net.TCPConn)))
			must(s.AddConn("tcp", "server", get(ln.Accept()).(*net.TCPConn)))
		},
		func(s *scene) {
			must(get(s.Conn("tcp", "server")).Close())
			must(get(s.Conn("tcp", "client")).Close())
		},
		func(s *scene) {
			get(get(s.Conn("tcp", "client")).Write([]byte("hello")))
			b := make([]byte, 5)
			get(get(s.Conn("tcp", "server")).Read(b))
			s.say("%s", b)
		},
	),
	"replacing a connection": generations(
		func(s *scene) {
			ln := get(net.Listen("tcp", loopback))
			a, b := get(net.Dial("tcp", ln.Addr().String())), get(net.Dial("tcp", ln.Addr().String()))
			must(s.AddConn("tcp", "c", a.(*net.TCPConn)))
			must(s.AddConn("tcp", "c", b.(*net.TCPConn)))
			note("B", b.LocalAddr().String())
		},
		func(s *scene) { s.say("the second %v", get(s.Conn("tcp", "c")).LocalAddr().String() == noted("B")) },
	),
	"names of different kinds": generations(
		func(s *scene) {
			must(s.AddFile("tcp", s.file("a", "file")))
			must(s.AddListener("tcp", "", get(net.Listen("tcp", loopback)).(*net.TCPListener)))
		},
		func(s *scene) {
			ln, err := s.Listener("tcp", "")
			s.say("a %s, and the listener %s", text(get(s.File("tcp"))), found(ln != nil, err))
		},
	),
	"looking up in the first process": func(s *scene) {
		s.new()
		ln, err1 := s.Listener("tcp", ":80")
		pc, err2 := s.PacketConn("udp", ":80")
		c, err3 := s.Conn("tcp", ":80")
		f, err4 := s.File("f")
		all, err5 := s.Files()
		s.say("%s %s %s %s %s", found(ln != nil, err1), found(pc != nil, err2), found(c != nil, err3), found(f != nil, err4), found(len(all) > 0, err5))
	},
	"looking up names that are no addresses": func(s *scene) {
		s.new()
		ln, err1 := s.Listener("tcp", "web")
		pc, err2 := s.PacketConn("peculiar", "name")
		s.say("%s %s", found(ln != nil, err1), found(pc != nil, err2))
	},
	"looking up twice": generations(
		func(s *scene) {
			get(s.Listen("tcp", loopback))
			get(s.ListenPacket("udp", loopback))
			must(s.AddFile("f", s.file("a", "first")))
		},
		func(s *scene) {
			get(s.Listener("tcp", loopback))
			get(s.PacketConn("udp", loopback))
			get(s.File("f"))
			ln, err1 := s.Listener("tcp", loopback)
			pc, err2 := s.PacketConn("udp", loopback)
			f, err3 := s.File("f")
			s.say("%s %s %s", found(ln != nil, err1), found(pc != nil, err2), found(f != nil, err3))
		},
	),
	"looking up after Ready": generations(
		func(s *scene) {
			get(s.Listen("tcp", loopback))
			must(s.AddFile("f", s.file("a", "first")))
		},
		func(s *scene) {
			s.ready()
			ln, err1 := s.Listener("tcp", loopback)
			f, err2 := s.File("f")
			s.say("%s %s", found(ln != nil, err1), found(f != nil, err2))
		},
	),
	"looking up what was added here": func(s *scene) {
		s.new()
		must(s.AddListener("tcp", "web", get(net.Listen("tcp", loopback)).(*net.TCPListener)))
		must(s.AddFile("f", s.file("a", "first")))
		ln, err1 := s.Listener("tcp", "web")
		f, err2 := s.File("f")
		all, err3 := s.Files()
		s.say("%s %s %s", found(ln != nil, err1), found(f != nil, err2), found(len(all) > 0, err3))
	},
	"what Ready closes": func(s *scene) {
		s.new()
		get(s.Listen("tcp", loopback))
		if s.gen == 1 {
			s.ready()
			s.mark("ready")
			s.await("dialled")
			return
		}
		b := get(s.ListenWithCallback("tcp", "other", func(string, string) (net.Listener, error) { return net.Listen("tcp", loopback) }))
		s.ready()
		must(s.upgrade())
		<-s.Exit()
		s.await("ready")
		must(b.Close())
		_, err := net.Dial("tcp", b.Addr().String())
		s.say("refused %v", errors.Is(err, syscall.ECONNREFUSED))
		s.mark("dialled")
	},
	"a Unix socket that nobody asks for": generations(
		func(s *scene) {
			get(s.Listen("unix", s.path("made")))
			get(s.ListenPacket("unixgram", s.path("packet")))
			must(s.AddListener("unix", s.path("added"), get(net.Listen("unix", s.path("added"))).(*net.UnixListener)))
		},
		func(s *scene) {
			s.ready()
			must(s.WaitForParent(ctx()))
			s.say("%s %s %s", s.exists("made"), s.exists("packet"), s.exists("added"))
		},
	),

	// Upgrades.

	"New twice": func(s *scene) {
		s.new()
		_, err := tableflip.New(tableflip.Options{})
		s.say("%s", outcome(err))
	},
	"a negative time-out": func(s *scene) {
		s.new(tableflip.Options{UpgradeTimeout: -1})
		s.ready()
		if s.gen == 0 {
			s.say("%s", outcome(s.upgrade()))
		}
		must(s.WaitForParent(ctx()))
	},
	"Listen during an upgrade": func(s *scene) {
		s.new()
		if s.gen == 1 {
			s.mark("started")
			s.await("listened")
			s.ready()
			return
		}
		s.ready()
		upgraded := make(chan error)
		go func() { upgraded <- s.upgrade() }()
		s.await("started")
		_, err := s.Listen("tcp", loopback)
		s.say("%s", outcome(err))
		s.mark("listened")
		must(<-upgraded)
	},
	"Listen after an upgrade that fails": func(s *scene) {
		s.new()
		if s.gen == 1 {
			os.Exit(1)
		}
		s.ready()
		s.say("Upgrade: %s", outcome(s.upgrade()))
		_, err := s.Listen("tcp", loopback)
		s.say("Listen: %s", outcome(err))
	},
	"Upgrade before Ready": func(s *scene) {
		s.new()
		s.say("%s", outcome(s.Upgrade()))
	},
	"Upgrade twice at once": func(s *scene) {
		s.new()
		if s.gen == 1 {
			s.mark("started")
			s.await("tried")
			s.ready()
			return
		}
		s.ready()
		upgraded := make(chan error)
		go func() { upgraded <- s.upgrade() }()
		s.await("started")
		second := s.Upgrade()
		s.mark("tried")
		s.say("%s, and the first one: %s", outcome(second), outcome(<-upgraded))
	},
	"Upgrade after the upgrade": func(s *scene) {
		s.new()
		s.ready()
		if s.gen == 0 {
			must(s.upgrade())
			<-s.Exit()
			s.say("%s", outcome(s.Upgrade()))
		}
	},
	"Upgrade while the parent is there": func(s *scene) {
		s.new()
		s.ready()
		switch s.gen {
		case 0:
			must(s.upgrade())
			s.await("refused")
		case 1:
			s.say("%s", outcome(s.upgradeReady()))
			s.mark("refused")
			must(s.WaitForParent(ctx()))
			must(s.upgrade())
		case 2:
			s.say("serves")
		}
	},
	"a successor that exits": func(s *scene) {
		s.new()
		if s.gen == 1 && noted("SECOND") == "" {
			os.Exit(3)
		}
		s.ready()
		if s.gen == 0 {
			first := s.upgrade()
			note("SECOND", "yes")
			s.say("%s, and then %s", outcome(first), outcome(s.upgrade()))
		}
		must(s.WaitForParent(ctx()))
	},
	"a successor that is late": func(s *scene) {
		if s.gen == 1 {
			s.await("never")
		}
		s.new(tableflip.Options{UpgradeTimeout: shortly})
		s.ready()
		s.say("%s", outcome(s.upgrade()))
	},
	"a PID file that cannot be written": func(s *scene) {
		s.new(tableflip.Options{PIDFile: s.path("d/pid")})
		if s.gen == 1 {
			s.say("Ready: %s", outcome(s.Ready()))
			return
		}
		must(os.Mkdir(s.path("d"), 0o700))
		s.ready()
		must(os.RemoveAll(s.path("d")))
		s.say("Upgrade: %s", outcome(s.upgrade()))
	},
	"a parent that is killed": func(s *scene) {
		s.new()
		get(s.Listen("tcp", loopback))
		if s.gen == 1 {
			s.mark("started")
			// The test reaps it, when all of its threads have ended.
			for _, err := os.Stat("/proc/" + noted("PARENT")); err == nil; _, err = os.Stat("/proc/" + noted("PARENT")) {
				time.Sleep(time.Millisecond)
			}
			s.say("Ready: %s", outcome(s.Ready()))
			return
		}
		note("PARENT", strconv.Itoa(os.Getpid()))
		s.ready()
		go s.upgrade()
		s.await("started")
		must(get(os.FindProcess(os.Getpid())).Kill())
		select {}
	},
	"Ready twice": generations(
		func(s *scene) {
			s.ready()
			s.say("%s", outcome(s.Ready()))
		},
		func(s *scene) {
			s.ready()
			s.say("%s", outcome(s.Ready()))
		},
	),
	"WaitForParent in the first process": func(s *scene) {
		s.new()
		s.say("parent %v, %s", s.HasParent(), outcome(s.WaitForParent(ctx())))
	},
	"WaitForParent": func(s *scene) {
		s.new()
		if s.gen == 0 {
			s.ready()
			must(s.upgrade())
			s.await("waited")
			return
		}
		s.say("parent %v", s.HasParent())
		s.say("before Ready: the context's error %v", s.WaitForParent(shortCtx()) == context.DeadlineExceeded)
		s.ready()
		s.say("while it is there: the context's error %v", s.WaitForParent(shortCtx()) == context.DeadlineExceeded)
		s.mark("waited")
		s.say("then: %s %s", outcome(s.WaitForParent(ctx())), outcome(s.WaitForParent(ctx())))
	},
	"the marker in the environment": generations(
		func(s *scene) { s.say("%q", os.Getenv("TABLEFLIP_HAS_PARENT_7DIU3")) },
		func(s *scene) { s.say("%q", os.Getenv("TABLEFLIP_HAS_PARENT_7DIU3")) },
	),
	"how a successor is started": generations(
		func(s *scene) {
			note("VARIABLE", "new")
			note("START", get(os.Getwd()))
			must(os.Chdir("/"))
		},
		func(s *scene) {
			s.say("arguments %v, variable %s, directory of the start %v", len(os.Args) == 3, noted("VARIABLE"), get(os.Getwd()) == noted("START"))
		},
	),

	// The end.

	"the PID file": func(s *scene) {
		s.new(tableflip.Options{PIDFile: s.path("pid")})
		s.ready()
		b := string(get(os.ReadFile(s.path("pid"))))
		s.say("this process's %v, a line's end %v", strings.TrimSpace(b) == strconv.Itoa(os.Getpid()), strings.HasSuffix(b, "\n"))
		s.Stop()
		<-s.Exit()
		s.say("after Stop it is %s", s.exists("pid"))
	},
	"the files of Unix sockets after Stop": func(s *scene) {
		s.new()
		get(s.Listen("unix", s.path("made")))
		must(s.AddListener("unix", s.path("added"), get(net.Listen("unix", s.path("added"))).(*net.UnixListener)))
		get(s.ListenWithCallback("unix", s.path("called"), net.Listen))
		get(s.ListenPacket("unixgram", s.path("packet")))
		s.ready()
		s.Stop()
		<-s.Exit()
		s.say("%s %s %s %s", s.exists("made"), s.exists("added"), s.exists("called"), s.exists("packet"))
	},
	"the same after an upgrade": generations(
		func(s *scene) {
			get(s.Listen("unix", s.path("made")))
			get(s.ListenWithCallback("unix", s.path("called"), net.Listen))
		},
		func(s *scene) {
			get(s.Listen("unix", s.path("made")))
			get(s.Listen("unix", s.path("called")))
			s.ready()
			must(s.WaitForParent(ctx()))
			s.say("before Stop %s %s", s.exists("made"), s.exists("called"))
			s.Stop()
			<-s.Exit()
			s.say("after it %s %s", s.exists("made"), s.exists("called"))
		},
	),
	"another's file in a Unix socket's place": func(s *scene) {
		s.new()
		get(s.Listen("unix", s.path("s")))
		s.ready()
		must(os.Remove(s.path("s")))
		get(net.Listen("unix", s.path("s")))
		s.Stop()
		<-s.Exit()
		s.say("%s", s.exists("s"))
	},
	"Stop after the upgrade": func(s *scene) {
		s.new()
		get(s.Listen("unix", s.path("s")))
		s.ready()
		if s.gen == 1 {
			s.await("stopped")
			s.say("the file is %s", s.exists("s"))
			return
		}
		must(s.upgrade())
		s.Stop()
		<-s.Exit()
		s.mark("stopped")
	},
	"Stop while a successor starts": func(s *scene) {
		s.new()
		if s.gen == 1 {
			s.mark("started")
			s.await("stopped")
			if s.Ready() == nil {
				s.say("serves")
			}
			return
		}
		s.ready()
		upgraded := make(chan error)
		go func() { upgraded <- s.upgrade() }()
		s.await("started")
		s.Stop()
		s.say("Upgrade: %s", outcome(<-upgraded))
		<-s.Exit()
		s.mark("stopped")
	},
	"Upgrade after Stop": func(s *scene) {
		s.new()
		s.ready()
		s.Stop()
		<-s.Exit()
		s.say("%s", outcome(s.Upgrade()))
	},
	"Stop before Ready": func(s *scene) {
		s.new()
		get(s.Listen("unix", s.path("s")))
		s.Stop()
		<-s.Exit()
		s.say("its file is %s", s.exists("s"))
	},
	"Stop twice": func(s *scene) {
		s.new()
		s.Stop()
		s.Stop()
		<-s.Exit()
		s.say("ok")
	},
}
