package osimage

import (
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// TestBuildRefuses refuses what would have no effect, and what there is not, before anything is fetched.
func TestBuildRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		o    Options
		want string
	}{
		"architecture":           {Options{Arch: "mips", Format: "vm"}, `"mips"`},
		"format":                 {Options{Arch: "amd64", Format: "floppy"}, `"floppy"`},
		"words in VM mode":       {Options{Arch: "amd64", Format: "vm", Words: "quiet"}, "command line"},
		"words for netboot":      {Options{Arch: "amd64", Format: "netboot", Words: "quiet"}, "command line"},
		"another kind of disk":   {Options{Arch: "amd64", Format: "disk", DiskFormat: "vmdk"}, `"vmdk"`},
		"a packed ISO image":     {Options{Arch: "amd64", Format: "iso", DiskFormat: "qcow2"}, "qcow2"},
		"a platform of a disk":   {Options{Arch: "amd64", Format: "disk", Platform: "cloud"}, `"cloud"`},
		"signed for Secure Boot": {Options{Arch: "amd64", Format: "iso", Owner: &Owner{}}, "Secure Boot"},
		"no configuration":       {Options{Arch: "amd64", Format: "vm", Config: []byte("version: 1\nbogus: 1\n")}, "bogus"},
	} {
		t.Run(name, func(t *testing.T) {
			c.o.Output, c.o.Cache = t.TempDir(), t.TempDir()
			if _, err := Build(t.Context(), c.o); err == nil || !strings.Contains(err.Error(), c.want) || fault.Of(err) == fault.Internal {
				t.Fatalf("%v, want %q", err, c.want)
			}
		})
	}
}
