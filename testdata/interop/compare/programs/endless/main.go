// Command endless is the server as the users of github.com/fvbock/endless write it.
package main

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"os"

	"github.com/fvbock/endless"
)

func main() {
	log.Print(endless.ListenAndServe(os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		fmt.Fprintln(w, os.Getpid())
	})))
}
