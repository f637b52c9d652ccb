// Package kernel gets kernels for images: Debian's packages, through apt (which
// verifies them), into a cache, and reads from them the kernel and its modules
// with what each module needs. Package osimage imports it.
package kernel

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Kernel is the content of a kernel's package.
type Kernel struct {
	// Version is as in uname -r, Package "name version" of where it is from.
	Version, Package string
	Image            []byte
	// Modules by name, with underscores; Builtin are those that are part of Image.
	Modules map[string]*Module
	Builtin map[string]bool
}

// Kind chooses among Debian's kernels.
type Kind string

// The kernels: for virtual machines, and for metal.
const (
	Cloud Kind = "cloud"
	Metal Kind = "metal"
)

// names of the packages that stand for the newest kernel.
var metapackages = map[Kind]map[string]string{
	Cloud: {"amd64": "linux-image-cloud-amd64", "arm64": "linux-image-cloud-arm64"},
	Metal: {"amd64": "linux-image-amd64", "arm64": "linux-image-arm64"},
}

// Get returns the kernel of a kind for an architecture (amd64, arm64) from the
// package at file, or, without a file, from the newest package of Debian's.
func Get(ctx context.Context, apt *Apt, kind Kind, arch, file string) (*Kernel, error) {
	if file == "" {
		meta := metapackages[kind][arch]
		if meta == "" {
			return nil, fault.New(fault.Unsupported, "there is no kernel for %s", arch)
		}
		var err error
		if file, err = apt.newest(ctx, meta, "linux-image-"); err != nil {
			return nil, err
		}
	}
	k, err := read(ctx, file)
	if err != nil {
		return nil, fmt.Errorf("cannot read the kernel's package %s: %w", filepath.Base(file), err)
	}
	return k, nil
}

// Files calls f for each regular file of a package.
func Files(ctx context.Context, deb string, f func(name string, size int64, r io.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("cannot unpack a package: %w", err)
	}
	walk := func() error {
		for tr := tar.NewReader(out); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				_, err = io.Copy(io.Discard, out)
				return err
			}
			if err != nil {
				return err
			}
			if h.Typeflag != tar.TypeReg {
				continue
			}
			if err := f(strings.TrimPrefix(h.Name, "./"), h.Size, tr); err != nil {
				return err
			}
		}
	}
	err = walk()
	if err != nil {
		cancel()
	}
	if werr := cmd.Wait(); err == nil && werr != nil {
		err = fmt.Errorf("dpkg-deb: %w: %s", werr, strings.TrimSpace(stderr.String()))
	}
	return err
}

func read(ctx context.Context, deb string) (*Kernel, error) {
	k := &Kernel{Modules: map[string]*Module{}, Builtin: map[string]bool{}}
	out, err := exec.CommandContext(ctx, "dpkg-deb", "--show", "--showformat=${Package} ${Version}", deb).Output()
	if err != nil {
		return nil, err
	}
	k.Package = string(out)
	err = Files(ctx, deb, func(name string, size int64, r io.Reader) error {
		name = strings.TrimPrefix(name, "usr/")
		switch {
		case strings.HasPrefix(name, "boot/vmlinuz-"):
			k.Version = strings.TrimPrefix(name, "boot/vmlinuz-")
			k.Image, err = io.ReadAll(r)
			return err
		case strings.HasSuffix(name, "/modules.builtin"):
			b, err := io.ReadAll(r)
			for _, line := range strings.Fields(string(b)) {
				k.Builtin[canonical(strings.TrimSuffix(filepath.Base(line), ".ko"))] = true
			}
			return err
		case strings.HasPrefix(name, "lib/modules/") && (strings.HasSuffix(name, ".ko") || strings.HasSuffix(name, ".ko.xz")):
			data := make([]byte, size)
			if _, err := io.ReadFull(r, data); err != nil {
				return err
			}
			if strings.HasSuffix(name, ".xz") {
				if data, err = unxz(ctx, data); err != nil {
					return err
				}
				name = strings.TrimSuffix(name, ".xz")
			}
			_, rel, _ := strings.Cut(strings.TrimPrefix(name, "lib/modules/"), "/")
			m, err := parseModule(rel, data)
			if err != nil {
				return err
			}
			k.Modules[m.Name] = m
		}
		return nil
	})
	if err == nil && (k.Image == nil || len(k.Modules) == 0) {
		err = errors.New("there is no kernel in it")
	}
	return k, err
}

func unxz(ctx context.Context, data []byte) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "xz", "-dc")
	cmd.Stdin = bytes.NewReader(data)
	return cmd.Output()
}

// Apt downloads packages.
type Apt struct {
	// Cache is a folder where packages are kept; Arch the packages' architecture.
	Cache, Arch string
	// Log takes progress.
	Log func(format string, args ...any)
}

// Download returns the file of the newest version of a package.
func (a *Apt) Download(ctx context.Context, name string) (string, error) {
	version, err := a.field(ctx, name, "Version")
	if err != nil {
		return "", err
	}
	arch, err := a.field(ctx, name, "Architecture")
	if err != nil {
		return "", err
	}
	// apt writes a colon in a version as %3a.
	file := filepath.Join(a.Cache, fmt.Sprintf("%s_%s_%s.deb", name, strings.ReplaceAll(version, ":", "%3a"), arch))
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	a.Log("downloading %s %s", name, version)
	dir, err := os.MkdirTemp(a.Cache, "download-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil { // apt's own user writes there
		return "", err
	}
	if out, err := a.run(ctx, dir, "apt-get", "download", "-q", name+":"+a.qualifier(arch)+"="+version); err != nil {
		return "", fault.New(fault.Unavailable, "cannot download the package %s: %w: %s", name, err, last(out))
	}
	found, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(found) != 1 {
		return "", fmt.Errorf("apt-get download left %d packages", len(found))
	}
	return file, os.Rename(found[0], file)
}

func (a *Apt) qualifier(arch string) string {
	if arch == "all" {
		return a.Arch
	}
	return arch
}

// newest returns the file of the package with a prefix that a meta-package depends on.
func (a *Apt) newest(ctx context.Context, meta, prefix string) (string, error) {
	depends, err := a.field(ctx, meta, "Depends")
	if err != nil {
		return "", err
	}
	for _, d := range strings.Split(depends, ",") {
		name, _, _ := strings.Cut(strings.TrimSpace(d), " ")
		if strings.HasPrefix(name, prefix) {
			return a.Download(ctx, name)
		}
	}
	return "", fault.New(fault.NotFound, "the package %s depends on no %s*", meta, prefix)
}

// field returns a field of the newest version of a package, updating apt's lists
// where they do not know it.
func (a *Apt) field(ctx context.Context, name, field string) (string, error) {
	if err := os.MkdirAll(a.Cache, 0o755); err != nil {
		return "", err
	}
	for attempt := range 2 {
		out, err := a.run(ctx, a.Cache, "apt-cache", "show", "--no-all-versions", name+":"+a.Arch)
		if err == nil {
			for _, line := range strings.Split(string(out), "\n") {
				if v, ok := strings.CutPrefix(line, field+": "); ok {
					return strings.TrimSpace(v), nil
				}
			}
		}
		if attempt == 0 {
			a.Log("updating the lists of packages")
			if out, err := a.run(ctx, a.Cache, "apt-get", "update", "-q"); err != nil {
				return "", fault.New(fault.Unavailable, "cannot update the lists of packages: %w: %s", err, last(out))
			}
		}
	}
	return "", fault.New(fault.NotFound, "there is no package %s for %s", name, a.Arch)
}

// run runs one of apt's programs, with lists of its own where the architecture
// is not the system's.
func (a *Apt) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if native, err := exec.CommandContext(ctx, "dpkg", "--print-architecture").Output(); err == nil && strings.TrimSpace(string(native)) != a.Arch {
		conf, err := a.foreign()
		if err != nil {
			return nil, err
		}
		cmd.Env = append(cmd.Env, "APT_CONFIG="+conf)
	}
	return cmd.CombinedOutput()
}

// foreign makes a folder of apt's for another architecture: the system's
// sources and keys, lists and status of its own.
func (a *Apt) foreign() (string, error) {
	base := filepath.Join(a.Cache, "apt-"+a.Arch)
	for _, d := range []string{"lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			return "", err
		}
	}
	status, conf := filepath.Join(base, "status"), filepath.Join(base, "apt.conf")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return "", err
	}
	text := fmt.Sprintf("APT::Architecture %q;\nAPT::Architectures { %q; };\nDir::State %q;\nDir::State::status %q;\nDir::Cache %q;\nAPT::Sandbox::User \"root\";\n",
		a.Arch, a.Arch, base, status, filepath.Join(base, "cache"))
	return conf, os.WriteFile(conf, []byte(text), 0o644)
}

func last(out []byte) string {
	lines := slices.DeleteFunc(strings.Split(string(out), "\n"), func(s string) bool { return strings.TrimSpace(s) == "" })
	if len(lines) == 0 {
		return ""
	}
	return strings.TrimSpace(lines[len(lines)-1])
}
