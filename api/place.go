package api

import (
	"os"
	"path/filepath"
	"strconv"
)

// UserRuntimeDir is where an ordinary user's engine keeps its socket and what
// does not outlive a boot, in a folder "servin": XDG_RUNTIME_DIR, else what
// systemd makes for that, else a folder among the temporary ones.
func UserRuntimeDir() string {
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return dir
	}
	uid := uidText()
	if dir := "/run/user/" + uid; isDir(dir) {
		return dir
	}
	return filepath.Join(os.TempDir(), "servin-"+uid)
}

func uidText() string { return strconv.Itoa(os.Getuid()) }

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}
