package vm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/release"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Image is a CloudOS image in VM format that has been opened and checked.
type Image struct {
	Dir         string `json:"dir"`
	Version     string `json:"version"`
	KernelVer   string `json:"kernelVersion"`
	CommandLine string `json:"commandLine"`
	// Kernel, Initrd and Root are paths.
	Kernel string `json:"kernel"`
	Initrd string `json:"initrd"`
	Root   string `json:"root"`
	// Disk is set instead of those three where the image is one bootable disk.
	Disk string `json:"disk,omitempty"`
	// Tar is set instead of those three where it is a distribution of WSL2; TarDigest is its SHA-256.
	Tar       string `json:"tar,omitempty"`
	TarDigest string `json:"tarDigest,omitempty"`
	// Digest names the image's whole content.
	Digest string `json:"digest"`
	// packed are the digests of what is to be unpacked (Unpack), by role.
	packed map[string]string
}

// maxManifest bounds image.json.
const maxManifest = 64 << 10

// OpenImage reads the image in dir and checks its files. A file that was found
// good is not read again as long as seen says so: seen maps a path to a stamp of
// size, time and digest, and is updated. With trusted keys, the image has to be signed by one.
func OpenImage(dir string, trusted []release.Key, seen map[string]string) (Image, error) {
	bad := func(format string, args ...any) (Image, error) {
		return Image{}, fault.New(fault.Invalid, "cannot use the image in %s: "+format, append([]any{dir}, args...)...)
	}
	f, err := os.Open(filepath.Join(dir, vmwire.Manifest))
	if errors.Is(err, fs.ErrNotExist) {
		return Image{}, fault.New(fault.NotFound, "cannot find a CloudOS image in %s: build one with 'cloudos image build --format vm' and name its folder with 'servin vm config --image DIR'", dir)
	}
	if err != nil {
		return bad("%w", err)
	}
	raw, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	f.Close()
	if err != nil {
		return bad("%w", err)
	}
	if err := signed(dir, raw, trusted); err != nil {
		return bad("%w", err)
	}
	m, err := ParseManifest(raw)
	if err != nil {
		return bad("%w", err)
	}
	if m.Arch != runtime.GOARCH {
		return bad("it is for %s, this computer is %s", m.Arch, runtime.GOARCH)
	}
	img := Image{Dir: dir, Version: m.Version, KernelVer: m.Kernel, CommandLine: m.CommandLine}
	sum := sha256.Sum256(raw)
	img.Digest = "sha256:" + hex.EncodeToString(sum[:])
	for role, path := range map[string]*string{"kernel": &img.Kernel, "initrd": &img.Initrd, "root": &img.Root, "disk": &img.Disk} {
		file, ok := m.Files[role]
		if !ok {
			continue // ParseManifest knows which may be missing
		}
		*path = filepath.Join(dir, file.Name)
		if err := verify(*path, file, seen); err != nil {
			return bad("%w", err)
		}
	}
	if m.Format == "wsl" {
		img.Tar, img.TarDigest, img.Root = img.Root, strings.ToLower(m.Files["root"].SHA256), ""
	}
	for role, f := range m.Files {
		if f.Format == vmwire.Packed && img.packed == nil {
			img.packed = map[string]string{}
		}
		if f.Format == vmwire.Packed {
			img.packed[role] = f.SHA256
		}
	}
	return img, nil
}

// ParseManifest reads image.json and checks what it says.
func ParseManifest(raw []byte) (vmwire.Image, error) {
	var m vmwire.Image
	if len(raw) > maxManifest {
		return m, fmt.Errorf("%s is longer than %d bytes", vmwire.Manifest, maxManifest)
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	if err := d.Decode(&m); err != nil {
		return m, fmt.Errorf("cannot read %s: %w", vmwire.Manifest, err)
	}
	if m.FormatVersion != vmwire.FormatVersion {
		return m, fmt.Errorf("its format is of version %d, this program knows %d", m.FormatVersion, vmwire.FormatVersion)
	}
	roles := []string{"kernel", "initrd", "root"}
	switch m.Format {
	case "vm":
	case "disk":
		roles = []string{"disk"}
	case "wsl":
		roles = []string{"root"}
	default:
		return m, fmt.Errorf("its format is %q, not vm, wsl or disk", m.Format)
	}
	if strings.ContainsAny(m.CommandLine, "\x00\n\r") || len(m.CommandLine) > 1500 {
		return m, errors.New("its kernel command line is not one line of at most 1500 bytes")
	}
	for _, role := range roles {
		if _, ok := m.Files[role]; !ok {
			return m, fmt.Errorf("it has no %s", role)
		}
	}
	for role, f := range m.Files {
		if f.Name == "" || f.Name != filepath.Base(f.Name) || strings.ContainsAny(f.Name, `/\,`+"\x00") || strings.HasPrefix(f.Name, ".") {
			return m, fmt.Errorf("%q is no name for its %s", f.Name, role)
		}
		if b, err := hex.DecodeString(f.SHA256); err != nil || len(b) != sha256.Size || f.Size <= 0 {
			return m, fmt.Errorf("its %s has no size or no digest", role)
		}
		if f.Format == vmwire.Packed && role != "kernel" && role != "root" {
			return m, fmt.Errorf("its %s is packed, which this program knows of kernel and root alone", role)
		}
	}
	return m, nil
}

func verify(path string, want vmwire.File, seen map[string]string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() != want.Size {
		return fmt.Errorf("%s has %d bytes instead of %d: was it copied whole?", want.Name, fi.Size(), want.Size)
	}
	stamp := fmt.Sprintf("%d %d %s", fi.Size(), fi.ModTime().UnixNano(), want.SHA256)
	if seen[path] == stamp {
		return nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != strings.ToLower(want.SHA256) {
		return fmt.Errorf("%s is damaged: its SHA-256 is %s instead of %s", want.Name, got, want.SHA256)
	}
	if seen != nil {
		seen[path] = stamp
	}
	return nil
}

// FindImage finds the installed image: beside the program, or where packages put it.
func FindImage(getenv func(string) string, program string) string {
	var dirs []string
	if d := getenv("SERVIN_VM_IMAGE"); d != "" {
		dirs = append(dirs, d)
	}
	bin := filepath.Dir(program)
	dirs = append(dirs, filepath.Join(bin, "vm"), filepath.Join(bin, "..", "share", "servin", "vm"),
		"/usr/local/share/servin/vm", "/usr/share/servin/vm")
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, vmwire.Manifest)); err == nil {
			return filepath.Clean(d)
		}
	}
	return dirs[len(dirs)-1]
}
