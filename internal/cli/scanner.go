package cli

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/cli/command"
)

// scanFlags are the bounds of a scan.
type scanFlags struct {
	memory, maxSize string
	timeout         time.Duration
	noCache         bool
	platform        string
}

func (o *scanFlags) declare(f *command.FlagSet) {
	f.String(&o.platform, "platform", "", "The image for this platform, os/arch[/variant]").Of("platform")
	f.String(&o.memory, "memory", "", "Memory that the scanner may take (default 1g)")
	f.String(&o.maxSize, "max-size", "", "What the image's layers may unpack to (default 20g)")
	f.Duration(&o.timeout, "timeout", "", "Time that the scanner may take (default 15m)")
	f.Bool(&o.noCache, "no-cache", "", "Read the image again, though its inventory is known")
}

func (o *scanFlags) args() []string {
	var out []string
	for _, x := range [][2]string{{"memory", o.memory}, {"max-size", o.maxSize}} {
		if x[1] != "" {
			out = append(out, "--"+x[0], x[1])
		}
	}
	if o.timeout > 0 {
		out = append(out, "--timeout", o.timeout.String())
	}
	return out
}

// maxComplaint bounds what is kept of the scanner's standard error.
const maxComplaint = 64 << 10

// scanner runs servin-scan: what parses hostile bytes with big libraries is no part
// of this program, and runs confined.
func (a *App) scanner(ctx context.Context, in io.Reader, out io.Writer, args ...string) error {
	const name = pluginPrefix + "scan"
	path := ""
	if self, err := os.Executable(); err == nil {
		path = filepath.Join(filepath.Dir(self), name)
		if runtime.GOOS == "windows" {
			path += ".exe"
		}
		if _, err := os.Stat(path); err != nil {
			path = ""
		}
	}
	if path == "" {
		var err error
		if path, err = exec.LookPath(name); err != nil {
			return fmt.Errorf("cannot find the program %s beside servin or on the PATH: install it", name)
		}
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 5 * time.Second
	cmd.Env = a.Environ()
	cmd.Stdin, cmd.Stdout = in, out
	var said bytes.Buffer
	cmd.Stderr = &bounded{w: &said, left: maxComplaint}
	err := cmd.Run()
	var ee *exec.ExitError
	if !errors.As(err, &ee) {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	text := strings.TrimPrefix(strings.TrimSpace(said.String()), name+": ")
	if text == "" {
		return exitWith(max(ee.ExitCode(), exitFailure), nil)
	}
	return exitWith(max(ee.ExitCode(), exitFailure), errors.New(text))
}

// bounded drops what is too much.
type bounded struct {
	w    io.Writer
	left int
}

func (b *bounded) Write(p []byte) (int, error) {
	n := min(len(p), b.left)
	b.left -= n
	if _, err := b.w.Write(p[:n]); err != nil {
		return 0, err
	}
	return len(p), nil
}

// inventoryVersion is part of the names of what is kept: a scanner that finds more
// must not be given what an older one found.
const inventoryVersion = "1"

const keptInventories = 64

// inventory opens the inventory of an image: the one kept under its digest, or a new
// one of the image as the engine saves it.
func (a *App) inventory(ctx context.Context, ref string, o *scanFlags) (*os.File, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	img, _, err := c.ImageInspect(ctx, ref, o.platform)
	if err != nil {
		return nil, err
	}
	dir, err := a.scanCache()
	if err != nil {
		return nil, err
	}
	id := strings.TrimPrefix(img.ID, "sha256:")
	if len(id) != 64 || strings.Trim(id, "0123456789abcdef") != "" {
		return nil, fmt.Errorf("cannot scan %s: the engine calls it %q, which is no digest", ref, img.ID)
	}
	file := filepath.Join(dir, id+"-"+inventoryVersion+".json")
	if !o.noCache {
		if f, err := os.Open(file); err == nil {
			now := time.Now()
			_ = os.Chtimes(file, now, now)
			return f, nil
		}
	}
	platform := img.Os + "/" + img.Architecture
	if img.Variant != "" {
		platform += "/" + img.Variant
	}
	if img.Os == "" || img.Architecture == "" {
		platform = ""
	}
	var only []string
	if platform != "" {
		only = []string{platform}
	}
	rc, err := c.ImageSave(ctx, []string{img.ID}, only)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	tmp, err := os.CreateTemp(dir, ".new-")
	if err != nil {
		return nil, fmt.Errorf("cannot keep the inventory: %w", err)
	}
	defer os.Remove(tmp.Name())
	if err := a.scanner(ctx, rc, tmp, append([]string{"catalog", "--name", ref}, o.args()...)...); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	if _, err := tmp.Seek(0, io.SeekStart); err != nil {
		return nil, errors.Join(err, tmp.Close())
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot keep the inventory: %w", err), tmp.Close())
	}
	trimCache(dir)
	return tmp, nil
}

// scanCache is where inventories are kept, readable by the user alone: they tell
// what is in private images.
func (a *App) scanCache() (string, error) {
	base := a.Getenv("SERVIN_SCAN_CACHE")
	if base == "" {
		d, err := os.UserCacheDir()
		if err != nil {
			d = os.TempDir()
		}
		base = filepath.Join(d, "servin")
	}
	dir := filepath.Join(base, "inventories")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("cannot make a directory for inventories: %w", err)
	}
	return dir, nil
}

// trimCache removes what was not used for longest, and what a killed command left.
func trimCache(dir string) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	type file struct {
		name string
		used time.Time
	}
	var list []file
	for _, e := range ents {
		st, err := e.Info()
		if err != nil {
			continue
		}
		if strings.HasPrefix(e.Name(), ".new-") {
			if time.Since(st.ModTime()) > 24*time.Hour {
				_ = os.Remove(filepath.Join(dir, e.Name()))
			}
			continue
		}
		list = append(list, file{e.Name(), st.ModTime()})
	}
	slices.SortFunc(list, func(a, b file) int { return cmp.Or(b.used.Compare(a.used), cmp.Compare(a.name, b.name)) })
	for _, f := range list[min(len(list), keptInventories):] {
		_ = os.Remove(filepath.Join(dir, f.name))
	}
}
