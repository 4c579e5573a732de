//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package tableflip

import (
	"bytes"
	"encoding/gob"
	"os"
	"slices"
	"testing"
	"time"
)

// FuzzParentNames reads what a tableflip process may write in the place of the list
// of names. It must be a list or an error. The bytes come in two pieces.
func FuzzParentNames(f *testing.F) {
	for _, v := range []any{
		[][]string{{kindListener, "tcp", ":80"}, {kindFile, "lock", ""}, {"later", "a", "b", "c"}, {}, nil},
		[][]string{}, []string{"a"}, "a", 7, map[string][]byte{"a": nil}, [][][]string{{{"a"}}}, struct{ A [][]string }{},
	} {
		var b bytes.Buffer
		if err := gob.NewEncoder(&b).Encode(v); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes(), 1)
		f.Add(b.Bytes()[:b.Len()-1], 0)
	}
	f.Add([]byte(nil), 0)
	f.Add([]byte("\xf8\xff\xff\xff\xff\xff\xff\xff\xff"), 0)
	f.Fuzz(func(t *testing.T, b []byte, cut int) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		written := make(chan struct{})
		go func() {
			defer close(written)
			defer w.Close()
			cut = min(max(cut, 0), len(b))
			if _, err := w.Write(b[:cut]); err == nil {
				_, _ = w.Write(b[cut:]) // an error means that enough was read
			}
		}()
		p := &parent{alive: r}
		names, err := p.readNames(time.Now().Add(20 * time.Second))
		r.Close()
		<-written
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := gob.NewEncoder(&again).Encode(names); err != nil {
			t.Fatal(err)
		}
		var list [][]string
		if err := gob.NewDecoder(&again).Decode(&list); err != nil || !slices.EqualFunc(list, names, slices.Equal) {
			t.Fatalf("%q became %q, %v", names, list, err)
		}
		for _, parts := range names {
			var k [3]string
			copy(k[:], parts)
			_ = keyOf(key{k[0], k[1], k[2]}.name())
		}
	})
}
