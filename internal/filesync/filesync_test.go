package filesync

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func write(t *testing.T, name, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMatch(t *testing.T) {
	dir := t.TempDir()
	r := &Rule{Path: dir, Target: "/app", Include: []string{"*.go", "sub"}, Ignore: []string{"*_test.go"}, Excluded: func(p string) bool { return strings.HasSuffix(p, "secret.go") }}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"a.go": "/app/a.go", "a_test.go": "", "a.txt": "", "sub/x.txt": "/app/sub/x.txt", "a.go~": "", ".git/a.go": "", "secret.go": "", "../a.go": "",
	} {
		ch, ok := r.Match(filepath.Join(r.Path, path))
		if ok != (want != "") || ch.Container != want {
			t.Errorf("%s: got %q %t, want %q", path, ch.Container, ok, want)
		}
	}
	if err := (&Rule{Path: "relative"}).Compile(); err == nil {
		t.Error("a relative path passes")
	}
	if err := (&Rule{Path: "/x", Ignore: []string{"["}}).Compile(); err == nil {
		t.Error("a malformed pattern passes")
	}
}

// TestWatch has files change and wants each change told, once what happens has
// come to rest.
func TestWatch(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/old.txt", "1")
	write(t, dir+"/node_modules/m/x.js", "1")
	r := &Rule{Path: dir, Target: "/app", Ignore: []string{"node_modules"}}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	ready := make(chan struct{})
	batches := make(chan []string, 16)
	done := make(chan error, 1)
	go func() {
		done <- Watch(ctx, []*Rule{r}, func() { close(ready) }, func(_ context.Context, paths []string) error {
			var got []string
			for _, p := range paths {
				if ch, ok := r.Match(p); ok {
					got = append(got, ch.Container)
				}
			}
			if len(got) > 0 {
				batches <- got
			}
			return nil
		})
	}()
	<-ready
	want := func(what string, paths ...string) {
		t.Helper()
		missing := slices.Clone(paths)
		for len(missing) > 0 {
			select {
			case got := <-batches:
				for _, g := range got {
					if strings.Contains(g, "node_modules") {
						t.Errorf("%s: told of %s", what, g)
					}
				}
				missing = slices.DeleteFunc(missing, func(m string) bool { return slices.Contains(got, m) })
			case err := <-done:
				t.Fatalf("%s: the watch ended: %v", what, err)
			case <-ctx.Done():
				t.Fatalf("%s: not told of %v", what, missing)
			}
		}
	}
	write(t, r.Path+"/node_modules/m/x.js", "2")
	write(t, r.Path+"/old.txt", "2")
	want("a change", "/app/old.txt")
	write(t, r.Path+"/new/deep/file", "1")
	want("a new folder with files", "/app/new/deep/file")
	write(t, r.Path+"/new/deep/file", "2")
	want("a change in a new folder", "/app/new/deep/file")
	// As editors do.
	write(t, r.Path+"/.tmp", "3")
	if err := os.Rename(r.Path+"/.tmp", r.Path+"/old.txt"); err != nil {
		t.Fatal(err)
	}
	want("a replacement", "/app/old.txt")
	if err := os.RemoveAll(r.Path + "/new"); err != nil {
		t.Fatal(err)
	}
	want("a removal", "/app/new")
	cancel()
	if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestPack(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a", "text")
	write(t, dir+"/d/b", "more")
	if err := os.Symlink("a", dir+"/l"); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	err := pack(&buf, []Change{{dir + "/d/b", "/app/d/b"}, {dir + "/l", "/app/l"}, {dir + "/d", "/app/d"}, {dir + "/a", "/app/a"}, {dir + "/gone", "/app/gone"}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for tr := tar.NewReader(&buf); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b, _ := io.ReadAll(tr)
		got = append(got, h.Name+"="+string(b)+h.Linkname)
		if h.Uid != 0 || h.Uname != "" {
			t.Errorf("%s belongs to %d %q", h.Name, h.Uid, h.Uname)
		}
	}
	if want := "app/a=text app/d/= app/d/b=more app/l=a"; strings.Join(got, " ") != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestEverything(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/a", "1")
	write(t, dir+"/skip/b", "1")
	write(t, dir+"/d/c", "1")
	r := &Rule{Path: dir, Target: "/", Ignore: []string{"skip"}}
	if err := r.Compile(); err != nil {
		t.Fatal(err)
	}
	list, err := r.Everything()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range list {
		got = append(got, c.Container)
	}
	if want := "/a /d /d/c"; strings.Join(got, " ") != want {
		t.Errorf("got %v, want %s", got, want)
	}
}
