// Package xz packs with the program xz (package xz-utils): the smallest form that Debian's kernels
// read by themselves, a fifth below zstd's. No library in Go comes near it. Since it takes its
// time, and most of an image is what it was in the last one, what was packed is kept.
package xz

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// unused is how long packed bytes stay that no image asked for.
const unused = 14 * 24 * time.Hour

// Packer packs blocks. It is safe for several at a time.
type Packer struct {
	tool  string
	x86   bool
	cache string
}

// New finds the program. arch is that of the machines: where their kernels know it, code is packed
// with its jumps made absolute, which repeats more. cache is a folder of the caller's own, made if it is missing.
func New(arch, cache string) (*Packer, error) {
	tool, err := exec.LookPath("xz")
	if err != nil {
		return nil, fault.New(fault.Unavailable, "cannot pack for real machines: the program xz is missing (Debian: apt-get install xz-utils)")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	return &Packer{tool: tool, x86: arch == "amd64", cache: cache}, sweep(cache)
}

// sweep removes what was not used for long.
func sweep(cache string) error {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err == nil && info.Mode().IsRegular() && time.Since(info.ModTime()) > unused {
			err = os.Remove(filepath.Join(cache, e.Name()))
		}
		if err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return nil
}

// Pack packs b, in one stream. code says that most of it is programs; window is the most that the
// reader keeps, a power of two and at least 4096. The same bytes become the same bytes.
func (p *Packer) Pack(ctx context.Context, b []byte, code bool, window int) ([]byte, error) {
	args := []string{"--format=xz", "--check=crc32", "--threads=1", "--stdout"} // the kernel checks no other sum
	if code && p.x86 {
		args = append(args, "--x86")
	}
	args = append(args, fmt.Sprintf("--lzma2=preset=6,dict=%d", window))
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d\n", strings.Join(args, " "), len(b))
	h.Write(b)
	kept := filepath.Join(p.cache, hex.EncodeToString(h.Sum(nil)))
	if out := read(kept); out != nil {
		return out, nil
	}
	cmd := exec.CommandContext(ctx, p.tool, args...)
	cmd.Env = []string{"LC_ALL=C"} // XZ_OPT and XZ_DEFAULTS of the caller would change the result
	cmd.Stdin = bytes.NewReader(b)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("xz: %w: %s", err, strings.TrimSpace(said.String()))
	}
	sum := sha256.Sum256(out.Bytes())
	return out.Bytes(), durable.WriteFile(kept, append(sum[:], out.Bytes()...), 0o644, durable.Nothing)
}

// read returns what was kept, and nil where it is not there or not whole.
func read(path string) []byte {
	b, err := os.ReadFile(path)
	if err != nil || len(b) < sha256.Size {
		return nil
	}
	out := b[sha256.Size:]
	if sha256.Sum256(out) != [sha256.Size]byte(b) {
		return nil
	}
	now := time.Now()
	_ = os.Chtimes(path, now, now) // it is in use
	return out
}
