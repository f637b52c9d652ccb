// Package hello embeds the image servin/hello, so that a first container runs
// without a registry. `make hello` builds it; a fresh clone builds without. The
// image package loads it.
package hello

import (
	"embed"
	"runtime"
)

//go:embed image
var files embed.FS

// Image returns the image as a tar that docker load would take, gzipped, and
// whether this build has one.
func Image() ([]byte, bool) {
	data, err := files.ReadFile("image/hello-" + runtime.GOARCH + ".tar.gz")
	return data, err == nil
}
