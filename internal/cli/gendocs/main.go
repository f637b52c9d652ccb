// Command gendocs writes the reference of the command line to docs/cli.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/cloudos-io/cloudos/internal/cli"
)

func main() {
	dir := "docs/cli"
	if len(os.Args) > 1 {
		dir = os.Args[1]
	}
	pages, err := cli.Reference()
	if err == nil {
		err = os.MkdirAll(dir, 0o755)
	}
	for name, text := range pages {
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o644)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "gendocs:", err)
		os.Exit(1)
	}
}
