package compose

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"
)

// terminal runs servin compose on a terminal of its own.
func (p *project) terminal(args ...string) (*background, *os.File) {
	p.t.Helper()
	b := &background{p: p, out: &output{mu: make(chan struct{}, 1)}}
	b.cmd = p.command(context.Background(), filepath.Join(p.e.bin, "servin"), append([]string{"compose"}, args...)...)
	b.cmd.Env = append(b.cmd.Env, "TERM=xterm")
	master, err := pty.StartWithSize(b.cmd, &pty.Winsize{Rows: 40, Cols: 120})
	if err != nil {
		p.t.Fatal(err)
	}
	read := make(chan struct{})
	go func() { _, _ = io.Copy(b.out, master); close(read) }()
	p.t.Cleanup(func() {
		if b.cmd.ProcessState == nil {
			_ = b.cmd.Process.Kill()
			_ = b.cmd.Wait()
		}
		_ = master.Close()
		<-read
	})
	return b, master
}

func (b *background) types(master *os.File, keys string) {
	b.p.t.Helper()
	if _, err := io.WriteString(master, keys); err != nil {
		b.p.t.Fatal(err)
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	p := newProject(t, `
services:
  web:
    image: bb
    command: sh -c 'echo here; exec sleep 1000'
    stop_grace_period: 0s
    develop: {watch: [{path: ./src, action: sync, target: /dst}]}
`, "src/a", "1")
	b, master := p.terminal("up")
	b.says("press d to detach, w to watch files, Ctrl-C to stop")
	b.says("here")
	before, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if before.Lflag&unix.ICANON != 0 || before.Lflag&unix.ISIG == 0 {
		t.Errorf("terminal flags are %#x: keys as they are typed and signals are wanted", before.Lflag)
	}
	b.types(master, "w")
	b.says("atch")
	p.eventually("a change reaches the container", func() bool {
		p.write("src/a", "2")
		return p.run("exec", "-T", "web", "cat", "/dst/a").out == "2"
	})
	b.types(master, "d")
	if code := b.ends(); code != 0 {
		t.Errorf("detaching gave exit %d; it said\n%s", code, b.out)
	}
	after, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if after.Lflag&unix.ICANON == 0 || after.Lflag&unix.ECHO == 0 {
		t.Errorf("the terminal was left with flags %#x", after.Lflag)
	}
	p.want("running", "ps", "--format", "{{.State}}")

	b, master = p.terminal("up", "--menu=false")
	b.says("Attaching to")
	b.types(master, "\x03")
	if code := b.ends(); code != 130 {
		t.Errorf("Ctrl-C gave exit %d, want 130; it said\n%s", code, b.out)
	}
	if strings.Contains(b.out.String(), "press d") {
		t.Error("keys were offered that were not wanted")
	}
	p.want("exited", "ps", "-a", "--format", "{{.State}}")
}
