// Command cloudos-modprobe is what the kernel runs when it wants a module:
// "cloudos-modprobe -q -- NAME". It loads it from the image, with what it needs.
package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/internal/osinit/modules"
)

func main() {
	s, err := modules.Open("/")
	failed := err != nil
	for _, a := range os.Args[1:] {
		if failed {
			break
		}
		if !strings.HasPrefix(a, "-") {
			for _, name := range s.Match(a) {
				if e := s.Load(name); e != nil {
					err, failed = e, true
				}
			}
		}
	}
	if failed {
		fmt.Fprintln(os.Stderr, "cloudos-modprobe:", err)
		os.Exit(1)
	}
}
