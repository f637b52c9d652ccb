package wsl

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// maxSaid bounds what is kept of what wsl.exe says.
const maxSaid = 64 << 10

// command is a call of wsl.exe. What it says is to be UTF-8 and nothing of our environment goes into
// the distribution.
func (d *Driver) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, d.cfg.Program, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(e string) bool {
		k, _, _ := strings.Cut(e, "=")
		return strings.EqualFold(k, "WSLENV") || strings.EqualFold(k, "WSL_UTF8")
	})
	cmd.Env = append(append(cmd.Env, "WSL_UTF8=1"), d.cfg.Env...)
	cmd.WaitDelay = 5 * time.Second
	apart(cmd)
	return cmd
}

// inside is a call of our program in a distribution.
func (d *Driver) inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	return d.command(ctx, append([]string{"--distribution", name, "--user", "root", "--cd", "/", "--exec", vmwire.DistributionProgram}, args...)...)
}

// failed is that wsl.exe ran and ended with a status.
type failed struct {
	status int
	said   string
}

func (f *failed) Error() string {
	if f.said == "" {
		return fmt.Sprintf("wsl.exe ended with status %d", f.status)
	}
	return f.said
}

// status tells how wsl.exe, or our program in it, ended.
func status(err error) (int, bool) {
	var f *failed
	if errors.As(err, &f) {
		return f.status, true
	}
	return 0, false
}

// run runs a command to its end and returns what it said.
func run(cmd *exec.Cmd) (string, error) {
	out := &limited{}
	cmd.Stdout, cmd.Stderr = out, out // wsl.exe says errors on standard output
	return ended(cmd.Run(), out)
}

func ended(err error, out *limited) (string, error) {
	said := strings.TrimSpace(decode(out.b.Bytes()))
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return said, &failed{exit.ExitCode(), short(said)}
	case err != nil:
		return said, fmt.Errorf("cannot run wsl.exe: %w", err)
	}
	return said, nil
}

// short is a text as part of an error: one line, bounded.
func short(s string) string {
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }), "; ")
	if len(s) > 500 {
		s = strings.ToValidUTF8(s[:500], "") + "…"
	}
	return s
}

// limited keeps the beginning of what is written to it.
type limited struct{ b bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	l.b.Write(p[:min(len(p), maxSaid-l.b.Len())])
	return len(p), nil
}

var _ io.Writer = (*limited)(nil)

// decode reads what wsl.exe says: UTF-8 where it knows WSL_UTF8, UTF-16 before.
func decode(b []byte) string {
	b = bytes.TrimPrefix(b, []byte("\xef\xbb\xbf"))
	wide := bytes.HasPrefix(b, []byte("\xff\xfe")) || len(b) >= 2 && bytes.IndexByte(b, 0) >= 0
	if !wide {
		return strings.ToValidUTF8(string(b), string(utf8.RuneError))
	}
	b = bytes.TrimPrefix(b, []byte("\xff\xfe"))
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	return strings.ReplaceAll(string(utf16.Decode(u)), "\x00", "")
}

// names are the distributions that a list has, one in a line.
func names(text string) []string {
	var out []string
	for _, l := range strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\r' }) {
		if l = strings.TrimSpace(l); l != "" {
			out = append(out, l)
		}
	}
	return out
}

// has says whether there is the distribution; with "--running", whether it runs. An empty list is one that
// wsl.exe ends with a status for, and a sentence in the user's language instead of names.
func (d *Driver) has(ctx context.Context, name string, more ...string) (bool, error) {
	out, err := run(d.command(ctx, append([]string{"--list", "--quiet"}, more...)...))
	if _, ok := status(err); err != nil && !ok {
		return false, err
	}
	// Windows compares them without case.
	return err == nil && slices.ContainsFunc(names(out), func(n string) bool { return strings.EqualFold(n, name) }), nil
}
