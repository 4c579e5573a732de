package ecdysis_test

import (
	"testing"
)

func tcp() spec { return spec{Listen: [][2]string{{"tcp", "127.0.0.1:0"}}} }

func TestUpgrade(t *testing.T) {
	t.Parallel()
	h := newHub(t, tcp())
	p := h.serving()
	p.serves()
	network, address := p.addr(0)
	l := startLoad(t, 2, false, [2]string{network, address})
	for range 5 {
		l.more(50)
		s := p.upgrade()
		s.serves()
		p.call("awaitexit")
		p = s
	}
	l.more(50)
	l.check()
	t.Log(l.answered.Load(), "requests")
}
