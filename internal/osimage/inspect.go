package osimage

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// contentsFile is beside an image and says what is in it.
const contentsFile = "contents.json"

// Content is one file of an image.
type Content struct {
	// Path is below kernel, initrd or root; Part groups files.
	Path string `json:"path"`
	Part string `json:"part"`
	// Size is the file's, Stored what it takes in the image, in bytes.
	Size   int64 `json:"size"`
	Stored int64 `json:"stored"`
}

// kernelFile is the kernel as the image has it.
func (s *system) kernelFile() []byte {
	if s.packedKernel != nil {
		return s.packedKernel
	}
	return s.kernel.Image
}

// contents writes what the image is made of.
func (s *system) contents(o Options) error {
	list := []Content{{"kernel", partKernel, int64(len(s.kernel.Image)), int64(len(s.kernelFile()))}}
	// It is packed as a whole: each file's share is by its size.
	var all int64
	for _, e := range s.initialTree.Sorted() {
		all += e.Size
	}
	for _, e := range s.initialTree.Sorted() {
		if e.Mode.IsRegular() {
			list = append(list, Content{"initrd/" + e.Path, "initrd: " + e.Part, e.Size, e.Size * int64(len(s.initrd)) / all})
		}
	}
	for _, e := range s.rootTree.Sorted() {
		if s.quickTree != nil && isQuick(e.Path) {
			continue // it is the one below
		}
		if e.Mode.IsRegular() {
			list = append(list, Content{"root/" + e.Path, e.Part, e.Size, s.rootUsage[e.Path]})
		}
	}
	if s.quickTree != nil {
		for _, e := range s.quickTree.Sorted() {
			if e.Mode.IsRegular() {
				list = append(list, Content{"root/bin/" + e.Path, e.Part, e.Size, s.quickUsage[e.Path]})
			}
		}
	}
	b, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(o.Output, contentsFile), append(b, '\n'), 0o644, durable.Content)
}

// Inspection is what Inspect found.
type Inspection struct {
	Image    vmwire.Image `json:"image"`
	Contents []Content    `json:"contents"`
}

// Inspect reads an image's folder and checks its files against their checksums.
func Inspect(dir string) (*Inspection, error) {
	in := new(Inspection)
	for name, to := range map[string]any{vmwire.Manifest: &in.Image, contentsFile: &in.Contents} {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fault.New(fault.NotFound, "cannot look into the image: %w", err)
		}
		if err := json.Unmarshal(b, to); err != nil {
			return nil, fault.New(fault.Invalid, "cannot read %s: %w", name, err)
		}
	}
	for role, f := range in.Image.Files {
		if f.Name != filepath.Base(f.Name) {
			return nil, fault.New(fault.Invalid, "the file %q of the image is not in its folder", f.Name)
		}
		r, err := os.Open(filepath.Join(dir, f.Name))
		if err != nil {
			return nil, fault.New(fault.NotFound, "cannot look into the image: %w", err)
		}
		h := sha256.New()
		n, err := io.Copy(h, r)
		r.Close()
		if err != nil {
			return nil, err
		}
		if n != f.Size || hex.EncodeToString(h.Sum(nil)) != f.SHA256 {
			return nil, fault.New(fault.Conflict, "the image's %s (%s) is not what was built: its checksum differs", role, f.Name)
		}
	}
	return in, nil
}

// Print writes what takes the space: by part, and the n biggest files.
func (in *Inspection) Print(w io.Writer, n int) {
	i := in.Image
	fmt.Fprintf(w, "CloudOS %s, %s, format %s\n", i.Version, i.Arch, i.Format)
	if i.Kernel != "" {
		fmt.Fprintf(w, "kernel %s (%s)\n", i.Kernel, i.KernelPackage)
	}
	fmt.Fprintln(w)
	if i.Config != "" {
		fmt.Fprintln(w, "configuration, where no other place has one:")
		for line := range strings.Lines(i.Config) {
			fmt.Fprintf(w, "  | %s\n", printable(strings.TrimRight(line, "\r\n")))
		}
		fmt.Fprintln(w)
	}
	row := func(name string, stored, size int64, files int) {
		fmt.Fprintf(w, "%-24s %9.2f MB %9.2f MB %6d\n", name, float64(stored)/1e6, float64(size)/1e6, files)
	}
	fmt.Fprintf(w, "%-24s %12s %12s %6s\n", "PART", "IN IMAGE", "UNPACKED", "FILES")
	type sum struct {
		name         string
		stored, size int64
		files        int
	}
	parts := map[string]*sum{}
	all := sum{}
	for _, c := range in.Contents {
		s := parts[c.Part]
		if s == nil {
			s = &sum{name: c.Part}
			parts[c.Part] = s
		}
		for _, s := range []*sum{s, &all} {
			s.stored, s.size, s.files = s.stored+c.Stored, s.size+c.Size, s.files+1
		}
	}
	var order []*sum
	for _, s := range parts {
		order = append(order, s)
	}
	slices.SortFunc(order, func(a, b *sum) int {
		if a.stored != b.stored {
			return int(b.stored - a.stored)
		}
		return strings.Compare(a.name, b.name)
	})
	for _, s := range order {
		row(s.name, s.stored, s.size, s.files)
	}
	if rest := in.rest(all.stored); rest > 0 {
		fmt.Fprintf(w, "%-24s %9.2f MB\n", "boot loaders, tables", float64(rest)/1e6)
		all.stored += rest
	}
	row("all", all.stored, all.size, all.files)
	files := slices.Clone(in.Contents)
	slices.SortFunc(files, func(a, b Content) int {
		if a.Stored != b.Stored {
			return int(b.Stored - a.Stored)
		}
		return strings.Compare(a.Path, b.Path)
	})
	fmt.Fprintf(w, "\n%-12s %12s  %s\n", "IN IMAGE", "UNPACKED", "FILE")
	for _, c := range files[:min(n, len(files))] {
		fmt.Fprintf(w, "%9.2f MB %9.2f MB  %s\n", float64(c.Stored)/1e6, float64(c.Size)/1e6, c.Path)
	}
	fmt.Fprintln(w)
	for _, role := range []string{"kernel", "initrd", "root", "disk", "iso", "release"} {
		if f, ok := i.Files[role]; ok {
			fmt.Fprintf(w, "%-8s %9.2f MB  %s  sha256:%s\n", role, float64(f.Size)/1e6, f.Name, f.SHA256)
		}
	}
}

// rest is what the files have besides their contents: boot loaders, partition tables, the tree of hashes. A raw
// disk is mostly holes.
func (in *Inspection) rest(stored int64) int64 {
	var size int64
	for _, f := range in.Image.Files {
		if f.Name == "disk.raw" {
			return 0
		}
		size += f.Size
	}
	return size - stored
}

// printable drops what a terminal would take for orders.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r >= 0x7f && r < 0xa0 {
			return -1
		}
		return r
	}, s)
}
