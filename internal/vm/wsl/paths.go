package wsl

import (
	"fmt"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Place says where WSL has a folder of Windows: C:\Users\ada is /mnt/c/Users/ada. It knows paths of drives
// alone: those of the network are not there.
func Place(path string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fault.New(fault.Invalid, "cannot share %q with the machine: %s", path, why)
	}
	if len(path) < 3 || path[1] != ':' || path[2] != '\\' && path[2] != '/' || !letter(path[0]) {
		return bad(`a folder in WSL2 is on a drive of this computer, such as C:\Users\ada`)
	}
	out := []string{vmwire.DistributionDrives, strings.ToLower(path[:1])}
	for _, part := range strings.FieldsFunc(path[3:], func(r rune) bool { return r == '\\' || r == '/' }) {
		if part == "." || part == ".." || strings.ContainsAny(part, "\x00\n:*?\"<>|") {
			return bad("it is no clean path")
		}
		out = append(out, part)
	}
	return strings.Join(out, "/"), nil
}

// Origin says which folder of Windows WSL has at a path.
func Origin(path string) (string, error) {
	rest, ok := strings.CutPrefix(path, vmwire.DistributionDrives+"/")
	drive, rest, _ := strings.Cut(rest, "/")
	if !ok || len(drive) != 1 || !letter(drive[0]) || strings.ContainsAny(rest, "\\:\x00\n") {
		return "", fmt.Errorf("%s is on no drive of Windows", path)
	}
	for _, part := range strings.Split(rest, "/") {
		if part == "." || part == ".." || part == "" && rest != "" {
			return "", fmt.Errorf("%s is no clean path", path)
		}
	}
	return strings.ToUpper(drive) + `:\` + strings.ReplaceAll(rest, "/", `\`), nil
}

func letter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }
