package wire

import (
	"os"
	"path/filepath"
)

// toolbox finds the tools of `servin debug`: beside the engine, or where they are
// installed. "" where there are none.
func toolbox() string {
	self, err := os.Executable()
	if err != nil {
		return ""
	}
	const name = "servin-toolbox.tar.gz"
	for _, p := range []string{filepath.Join(filepath.Dir(self), name), filepath.Join(filepath.Dir(self), "..", "lib", "servin", name)} {
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() {
			return p
		}
	}
	return ""
}
