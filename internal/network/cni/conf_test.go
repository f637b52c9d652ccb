package cni

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestConfiguration(t *testing.T) {
	many := make([]string, maxListPlugins+1)
	for i := range many {
		many[i] = "p"
	}
	for _, c := range []struct {
		name    string
		files   map[string]string
		want    []string // networks
		problem string
	}{
		{"none", nil, nil, ""},
		{"lexical order", map[string]string{"20-b.conflist": chain("1.0.0", "b", "p"), "10-a.conflist": chain("0.3.1", "a", "p")}, []string{"a", "b"}, ""},
		{"single plugin", map[string]string{"10-a.conf": `{"name":"a","cniVersion":"0.2.0","type":"p"}`}, []string{"a"}, ""},
		{"json", map[string]string{"10-a.json": `{"name":"a","type":"p"}`}, []string{"a"}, ""},
		{"others are not looked at", map[string]string{"10-a.bak": "x", ".10-b.conflist": "x", "README": "x"}, nil, ""},
		{"the first is broken", map[string]string{"10-a.conflist": "{", "20-b.conflist": chain("1.0.0", "b", "p")}, []string{"b"}, "10-a.conflist"},
		{"all are broken", map[string]string{"10-a.conflist": "[]"}, nil, "10-a.conflist"},
		{"a list in a .conf", map[string]string{"10-a.conf": chain("1.0.0", "a", "p")}, nil, "type"},
		{"no plugins", map[string]string{"10-a.conflist": `{"name":"a","cniVersion":"1.0.0","plugins":[]}`}, nil, "plugins"},
		{"no plugins key", map[string]string{"10-a.conflist": `{"name":"a","cniVersion":"1.0.0"}`}, nil, "plugins"},
		{"too many plugins", map[string]string{"10-a.conflist": chain("1.0.0", "a", many...)}, nil, "33 plugins"},
		{"no type", map[string]string{"10-a.conflist": chain("1.0.0", "a", `{"x":1}`)}, nil, "type"},
		{"path as type", map[string]string{"10-a.conflist": chain("1.0.0", "a", "../../bin/sh")}, nil, "no name of a plugin"},
		{"parent as type", map[string]string{"10-a.conflist": chain("1.0.0", "a", "..")}, nil, "no name of a plugin"},
		{"bad name", map[string]string{"10-a.conflist": chain("1.0.0", "../a", "p")}, nil, "network name"},
		{"no name", map[string]string{"10-a.conflist": chain("1.0.0", "", "p")}, nil, "network name"},
		{"future", map[string]string{"10-a.conflist": chain("7.0.0", "a", "p")}, nil, "7.0.0"},
		{"choice of versions", map[string]string{"10-a.conflist": `{"name":"a","cniVersions":["0.4.0","1.0.0","7.0.0"],"plugins":[{"type":"p"}]}`}, []string{"a"}, ""},
		{"too large", map[string]string{"10-a.conflist": chain("1.0.0", "a", "p") + strings.Repeat(" ", maxConfFile)}, nil, "larger"},
		{"plugins in a folder", map[string]string{"10-a.conflist": `{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"p"}]}`, "a/1.conf": `{"type":"q"}`, "a/2.txt": "x"}, []string{"a"}, ""},
		{"inlined plugins only", map[string]string{"10-a.conflist": `{"name":"a","cniVersion":"1.1.0","loadOnlyInlinedPlugins":true,"plugins":[{"type":"p"}]}`, "a/1.conf": `{`}, []string{"a"}, ""},
		{"broken plugin in a folder", map[string]string{"10-a.conflist": `{"name":"a","cniVersion":"1.1.0","plugins":[{"type":"p"}]}`, "a/1.conf": `{`}, nil, "1.conf"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, nil)
			for f, content := range c.files {
				_ = os.MkdirAll(filepath.Dir(filepath.Join(b.conf, f)), 0o755)
				write(t, filepath.Join(b.conf, f), content)
			}
			b.reload()
			var got []string
			for _, n := range b.Networks() {
				got = append(got, n.Name)
			}
			if strings.Join(got, " ") != strings.Join(c.want, " ") {
				t.Errorf("networks %q, want %q", got, c.want)
			}
			if b.wrong == nil && c.problem != "" || b.wrong != nil && (c.problem == "" || !strings.Contains(b.wrong.Error(), c.problem)) {
				t.Errorf("problem %v, want %q", b.wrong, c.problem)
			}
			if b.Present() != (len(c.want) > 0 || c.problem != "") {
				t.Error("Present is wrong")
			}
			_, err := b.Network("")
			if len(c.want) == 0 && (!fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), c.problem)) {
				t.Errorf("no network: %v", err)
			}
		})
	}
	t.Run("fifo", func(t *testing.T) {
		b := newBed(t, nil)
		if err := syscall.Mkfifo(filepath.Join(b.conf, "10-a.conflist"), 0o600); err != nil {
			t.Fatal(err)
		}
		b.reload()
		if b.wrong == nil {
			t.Error("a fifo was read")
		}
	})
	t.Run("folder's plugins are of the chain", func(t *testing.T) {
		b := newBed(t, nil)
		_ = os.MkdirAll(filepath.Join(b.conf, "a"), 0o755)
		write(t, filepath.Join(b.conf, "a", "1.conf"), `{"type":"q","capabilities":{"mac":true,"ips":false}}`)
		b.list("10-a.conflist", chain("1.1.0", "a", "p"))
		n, err := b.Network("a")
		if err != nil || strings.Join(n.Plugins, " ") != "p q" || !n.Has(MAC) || n.Has(IPs) {
			t.Errorf("%+v %v", n, err)
		}
	})
}

func TestWatch(t *testing.T) {
	b := newBed(t, nil)
	if err := os.Remove(b.conf); err != nil { // it may come later
		t.Fatal(err)
	}
	b.run()
	name := func(want string) func() bool {
		return func() bool {
			n, err := b.Network("")
			return n.Name == want && (err == nil) == (want != "")
		}
	}
	if !name("")() {
		t.Error("there is a network")
	}
	if err := os.MkdirAll(b.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	eventually(t, "watching the new folder", func() bool {
		// Only the watch itself tells that it is there: write until it sees it.
		write(t, filepath.Join(b.conf, "50-b.conflist"), chain("1.0.0", "b", "p"))
		return name("b")()
	})
	write(t, filepath.Join(b.conf, "10-a.conflist"), chain("1.0.0", "a", "p"))
	eventually(t, "the new default", name("a"))
	write(t, filepath.Join(b.conf, "10-a.conflist"), `{`)
	eventually(t, "falling back", name("b"))
	write(t, filepath.Join(b.conf, "10-a.conflist"), chain("1.0.0", "a2", "p"))
	eventually(t, "the mended one", name("a2"))
	// As network add-ons do it: written beside, renamed over.
	write(t, filepath.Join(b.conf, "new"), chain("1.0.0", "a3", "p"))
	if err := os.Rename(filepath.Join(b.conf, "new"), filepath.Join(b.conf, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the renamed one", name("a3"))
	// The directory is replaced as a whole.
	if err := os.Rename(b.conf, b.conf+".old"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "its going", name(""))
	if err := os.Mkdir(b.conf, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(b.conf, "10-c.conflist"), chain("1.0.0", "c", "p"))
	eventually(t, "the new directory", name("c"))
}

func TestStatus(t *testing.T) {
	b := newBed(t, nil)
	ctx := context.Background()
	if err := b.Status(ctx, ""); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), b.conf) {
		t.Errorf("without configuration: %v", err)
	}
	b.list("10-a.conflist", chain("1.1.0", "a", "p"))
	if err := b.Status(ctx, ""); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), `"p"`) {
		t.Errorf("without the plugin: %v", err)
	}
	b.script("p", `[ -e $L.bad ] && { echo '{"code":50,"msg":"no agent"}'; exit 1; }; exit 0`)
	if err := b.Status(ctx, ""); err != nil {
		t.Error(err)
	}
	write(t, filepath.Join(b.dir, "log.bad"), "")
	if err := b.Status(ctx, ""); err != nil {
		t.Errorf("the verdict was not kept: %v", err)
	}
	b.reload()
	if err := b.Status(ctx, ""); !fault.Is(err, fault.Unavailable) || !strings.Contains(err.Error(), "no agent") {
		t.Errorf("a plugin that is not ready: %v", err)
	}
	// Plugins that do not know the command are taken to be ready.
	b.script("p", `echo '{"code":4,"msg":"unknown CNI_COMMAND: STATUS"}'; exit 1`)
	b.reload()
	if err := b.Status(ctx, ""); err != nil {
		t.Error(err)
	}
	// Before 1.1.0 they are not asked.
	b.script("p", "exit 1")
	b.list("10-a.conflist", chain("1.0.0", "a", "p"))
	if err := b.Status(ctx, ""); err != nil {
		t.Error(err)
	}
}
