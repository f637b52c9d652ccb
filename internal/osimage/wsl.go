package osimage

import (
	"archive/tar"
	"compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/osimage/kernel"
	"github.com/cloudos-io/cloudos/internal/osimage/tree"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// distributionConf is what WSL reads of the distribution before anything runs in it: no systemd, no programs
// of Windows from inside, no graphics libraries, and Windows' drives below /mnt.
const distributionConf = `[boot]
systemd=false

[automount]
enabled=true
mountFsTab=false

[interop]
enabled=false
appendWindowsPath=false

[gpu]
enabled=false

[network]
generateHosts=false
generateResolvConf=true

[user]
default=root
`

// buildDistribution makes the format wsl: one tar that "wsl --import" takes. Kernel, modules and the first
// process are Microsoft's (ADR 58).
func buildDistribution(ctx context.Context, o Options) (*vmwire.Image, error) {
	apt := &kernel.Apt{Cache: o.Cache, Arch: o.Arch, Log: o.Log}
	system, err := systemRoot(ctx, o, apt, nil, nil)
	if err != nil {
		return nil, err
	}
	if err := addTrust(system, o, kernel.Cloud); err != nil {
		return nil, err
	}
	t, err := distribution(o, system)
	if err != nil {
		return nil, err
	}
	img := &vmwire.Image{FormatVersion: vmwire.FormatVersion, Format: o.Format, Version: o.Version, Arch: o.Arch, Config: string(o.Config), Files: map[string]vmwire.File{}}
	var stored map[string]int64
	return img, finish(img, o, "root", "root.tar.gz", vmwire.Tar, func(f *os.File) error {
		if stored, err = writeTar(f, t); err != nil {
			return err
		}
		return distributionContents(o, t, stored)
	})
}

// distribution lays the system out as a distribution: in a slot, with the folders around it that WSL's own
// first process writes to.
func distribution(o Options, system *tree.Tree) (*tree.Tree, error) {
	if _, err := system.File("bin/cloudos-init", 0o755, partInit, filepath.Join(o.Programs, "cloudos-init")); err != nil {
		return nil, fmt.Errorf("%w (make build)", err)
	}
	t := tree.New()
	for _, d := range []string{"bin", "dev", "etc", "home", "lib", "lib64", "mnt", "opt", "proc", "root", "run", "sbin", "sys", "usr/bin", "usr/sbin", "var"} {
		t.Dir(d, 0o755)
	}
	t.Dir("tmp", fs.ModeSticky|0o777)
	t.Dir(vmwire.DistributionData, 0o700)
	slot := path.Join(vmwire.DistributionSlots, vmwire.DistributionFirst)
	t.Symlink(vmwire.DistributionSystem, slot)
	for name, text := range map[string]string{
		"wsl.conf": distributionConf,
		"passwd":   "root:x:0:0:root:/:/nonexistent\nnobody:x:65534:65534:nobody:/nonexistent:/nonexistent\n",
		"group":    "root:x:0:\nnogroup:x:65534:\n",
		"hosts":    "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
	} {
		t.Bytes("etc/"+name, 0o644, partSettings, []byte(text))
		// Those that follow an image find them in its slot.
		system.Bytes("distribution/etc/"+name, 0o644, partSettings, []byte(text))
	}
	return t, t.Graft(slot, system)
}

// writeTar writes the tree as a packed tar, and tells what its files take, each a share by its size: it is
// packed as a whole.
func writeTar(w io.Writer, t *tree.Tree) (map[string]int64, error) {
	counted := &counter{w: w}
	z, err := gzip.NewWriterLevel(counted, gzip.DefaultCompression)
	if err != nil {
		return nil, err
	}
	out := tar.NewWriter(z)
	stored := map[string]int64{}
	for _, e := range t.Sorted() {
		if e.Path == "." {
			continue
		}
		before := counted.n
		if err := addEntry(out, e); err != nil {
			return nil, fmt.Errorf("cannot pack %s: %w", e.Path, err)
		}
		if e.Mode.IsRegular() {
			if err := z.Flush(); err != nil {
				return nil, err
			}
			stored[e.Path] = counted.n - before
		}
	}
	if err := out.Close(); err != nil {
		return nil, err
	}
	return stored, z.Close()
}

func addEntry(out *tar.Writer, e *tree.Entry) error {
	h := &tar.Header{Name: e.Path, Mode: int64(e.Mode.Perm()), ModTime: time.Unix(epoch, 0), Format: tar.FormatUSTAR}
	if e.Mode&fs.ModeSticky != 0 {
		h.Mode |= 0o1000
	}
	switch {
	case e.Mode.IsDir():
		h.Typeflag, h.Name = tar.TypeDir, e.Path+"/"
	case e.Mode&fs.ModeSymlink != 0:
		h.Typeflag, h.Linkname = tar.TypeSymlink, e.Link
	case e.Mode.IsRegular():
		h.Typeflag, h.Size = tar.TypeReg, e.Size
	default:
		return fmt.Errorf("a distribution has no %v", e.Mode)
	}
	if err := out.WriteHeader(h); err != nil || !e.Mode.IsRegular() {
		return err
	}
	r, err := e.Open()
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.Copy(out, r)
	return err
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

func distributionContents(o Options, t *tree.Tree, stored map[string]int64) error {
	var list []Content
	slot := path.Join(vmwire.DistributionSlots, vmwire.DistributionFirst) + "/"
	for _, e := range t.Sorted() {
		if e.Mode.IsRegular() {
			list = append(list, Content{"root/" + strings.TrimPrefix(e.Path, slot), e.Part, e.Size, stored[e.Path]})
		}
	}
	b, err := json.MarshalIndent(list, "", " ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(o.Output, contentsFile), append(b, '\n'), 0o644, durable.Content)
}
