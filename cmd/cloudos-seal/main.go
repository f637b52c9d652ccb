// Command cloudos-seal asks the machine's TPM for the first process, which runs it:
// one request on standard input, one answer on standard output.
package main

import (
	"fmt"
	"os"

	"github.com/cloudos-io/cloudos/internal/osinit/tpm"
)

func main() {
	if err := tpm.Serve(os.Stdin, os.Stdout); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}
