package model

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// rawEnv reads the format of `docker run --env-file`: no quotes, no variables.
func rawEnv(r io.Reader, filename string, vars map[string]string, lookup func(string) (string, bool)) error {
	sc := bufio.NewScanner(r)
	sc.Buffer(nil, 1<<20)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimLeft(strings.TrimPrefix(sc.Text(), "\ufeff"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		k, v, ok := strings.Cut(line, "=")
		if k == "" || strings.ContainsAny(k, " \t") {
			return fmt.Errorf("cannot read %s: line %d: a variable's name is empty or has blanks", filename, n)
		}
		if !ok {
			if v, ok = lookup(k); !ok {
				continue
			}
		}
		vars[k] = v
	}
	if err := sc.Err(); err != nil {
		return fmt.Errorf("cannot read %s: %w", filename, err)
	}
	return nil
}
