// Package line has what the programs say to the tests, and how they answer
// clients. Nothing in it knows either library.
package line

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

const generationVar = "TEST_GENERATION"

// Generation is this process's in its chain. The next one is in the
// environment that the successor gets.
var Generation = func() int {
	n, _ := strconv.Atoi(os.Getenv(generationVar)) // 0 in the first process
	os.Setenv(generationVar, strconv.Itoa(n+1))
	return n
}()

// Say writes a line for the test: this process's ID, its generation, and the
// words.
func Say(format string, args ...any) {
	fmt.Printf("%d %d %s\n", os.Getpid(), Generation, fmt.Sprintf(format, args...))
}

// pointVar names a directory of orders: the file 1.listened says what process 1
// of the chain does at the point "listened".
const pointVar = "TEST_ORDERS"

// Point obeys the order for a point, if there is one: "exit", "kill", "spawn",
// which says what another program inherits, or "hold", which ends when the file
// has gone.
func Point(name string) {
	path := filepath.Join(os.Getenv(pointVar), fmt.Sprintf("%d.%s", Generation, name))
	order, err := os.ReadFile(path)
	if err != nil {
		return
	}
	Say("at %s", name)
	self, _ := os.FindProcess(os.Getpid())
	switch string(order) {
	case "exit":
		os.Exit(3)
	case "kill":
		self.Kill()
		select {}
	case "spawn":
		// ls has one more, for the directory that it reads.
		out, err := exec.Command("sh", "-c", "echo $(ls /proc/self/fd) marker=$TABLEFLIP_HAS_PARENT_7DIU3").CombinedOutput()
		Say("spawned %s %v", strings.TrimSpace(string(out)), err)
	case "hold":
		for err == nil {
			time.Sleep(time.Millisecond)
			_, err = os.Stat(path)
		}
	}
}

// Ordered reports whether there is a file of this name among the orders.
func Ordered(name string) bool {
	_, err := os.Stat(filepath.Join(os.Getenv(pointVar), name))
	return err == nil
}

// Answer is what a client gets for a line.
func Answer() string { return fmt.Sprintf("%d %d\n", os.Getpid(), Generation) }

// Serve answers a connection's lines until the client closes it. A line "keep"
// is for the caller: Serve returns true, and has not answered it.
func Serve(c net.Conn) (keep bool) {
	for r := bufio.NewReader(c); ; {
		s, err := r.ReadString('\n')
		if err == nil && strings.TrimSpace(s) == "keep" {
			return true
		}
		if err == nil {
			_, err = io.WriteString(c, Answer())
		}
		if err != nil {
			c.Close()
			return false
		}
	}
}
