package ociruntime

import "github.com/cloudos-io/cloudos/internal/criu"

// quoteErrors logs what criu's own log says of errors.
func quoteErrors(log *logger, dir, file string) {
	lines, err := criu.Errors(dir, file, 20)
	if err != nil {
		log.Warnf("%v; criu check may tell what this kernel lacks", err)
		return
	}
	for _, l := range lines {
		log.Warnf("criu: %s", l)
	}
}
