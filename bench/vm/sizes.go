package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// sizes builds each format of image for each architecture whose programs there are, and says what they have.
func (b *bench) sizes() error {
	fmt.Fprintln(&b.out, "\n## Sizes of images\n\nMB. The bars are those with the engine.\n\n| | all | kernel with modules |\n|---|---|---|\n| *bar* | *60* | *50* |")
	tool := filepath.Join(b.bin, "cloudos")
	for _, arch := range []string{"amd64", "arm64"} {
		programs := filepath.Join(b.bin, arch)
		if _, err := os.Stat(programs); err != nil {
			if programs = b.bin; !builtFor(b.bin, arch) {
				fmt.Fprintf(os.Stderr, "SKIP: there are no programs for %s (make arm64): their images are not measured\n", arch)
				continue
			}
		}
		for _, format := range []string{"vm", "wsl", "disk", "netboot", "release", "iso"} {
			dir := filepath.Join(b.dir, "sizes")
			args := []string{"image", "build", "-q", "--arch", arch, "--format", format, "--programs", programs, "-o", dir}
			if format == "disk" {
				args = append(args, "--disk-format", "qcow2")
			}
			if o, err := exec.CommandContext(b.ctx, tool, args...).CombinedOutput(); err != nil {
				return fmt.Errorf("cannot build the image: %w: %s", err, o)
			}
			o, err := exec.CommandContext(b.ctx, tool, "image", "inspect", "--json", dir).Output()
			if err != nil {
				return fmt.Errorf("cannot look into the image: %w", err)
			}
			var in struct {
				Image struct {
					Files map[string]struct{ Size int64 }
				}
				Contents []struct {
					Part   string
					Stored int64
				}
			}
			if err := json.Unmarshal(o, &in); err != nil {
				return err
			}
			var all, kernel int64
			for _, f := range in.Image.Files {
				all += f.Size
			}
			for _, c := range in.Contents {
				if part := strings.TrimPrefix(c.Part, "initrd: "); part == "kernel" || part == "modules" {
					kernel += c.Stored
				}
			}
			fmt.Fprintf(&b.out, "| %s, %s | %.1f | %.1f |\n", format, arch, float64(all)/1e6, float64(kernel)/1e6)
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// builtFor tells whether the programs of a folder are for an architecture.
func builtFor(dir, arch string) bool {
	o, err := exec.Command("go", "version", "-m", filepath.Join(dir, "servind")).Output()
	return err == nil && strings.Contains(string(o), "GOARCH="+arch)
}
