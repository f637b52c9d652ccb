package tree

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type entry struct {
	name, link, data string
	typ              byte
	mode             int64
}

func archive(t *testing.T, list ...entry) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range list {
		h := &tar.Header{Name: e.name, Linkname: e.link, Typeflag: e.typ, Mode: e.mode, Size: int64(len(e.data)), ModTime: time.Unix(1e9, 0)}
		if h.Mode == 0 {
			h.Mode = 0o644
			if e.typ == tar.TypeDir {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		w.Write([]byte(e.data))
	}
	w.Close()
	return &b
}

func dir(name string) entry        { return entry{name: name, typ: tar.TypeDir} }
func file(name, data string) entry { return entry{name: name, typ: tar.TypeReg, data: data} }
func sym(name, to string) entry    { return entry{name: name, typ: tar.TypeSymlink, link: to} }
func hard(name, to string) entry   { return entry{name: name, typ: tar.TypeLink, link: to} }

// listing is a tree as text.
func listing(t *testing.T, root string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		switch {
		case rel == ".":
		case d.Type()&fs.ModeSymlink != 0:
			to, _ := os.Readlink(p)
			b.WriteString(rel + "->" + to + " ")
		case d.IsDir():
			b.WriteString(rel + "/ ")
		default:
			data, _ := os.ReadFile(p)
			b.WriteString(rel + "=" + string(data) + " ")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

func TestExtract(t *testing.T) {
	d := []entry{dir("d/"), file("d/f", "x"), dir("d/e/"), sym("d/l", "/etc/passwd"), hard("d/h", "d/f")}
	for name, x := range map[string]struct {
		from, to, want string
		list           []entry
	}{
		"renamed":       {"d", "new", "new/ new/e/ new/f=x new/h=x new/l->/etc/passwd", d},
		"same name":     {"d", "d", "d/ d/e/ d/f=x d/h=x d/l->/etc/passwd", d},
		"contents":      {"d", "", "e/ f=x h=x l->/etc/passwd", d},
		"dot":           {".", "", "a=1", []entry{dir("./"), file("./a", "1")}},
		"file":          {"f", "g", "g=1", []entry{file("f", "1")}},
		"no parent":     {"", "", "a/ a/b/ a/b/c=1", []entry{file("a/b/c", "1")}},
		"absolute":      {"d", "d", "d=1", []entry{file("/d", "1")}},
		"written twice": {"", "", "a=2", []entry{file("a", "1"), file("a", "2")}},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			if err := Extract(archive(t, x.list...), root, ExtractOptions{From: x.from, To: x.to}); err != nil {
				t.Fatal(err)
			}
			if got := listing(t, root); got != x.want {
				t.Errorf("got %q, want %q", got, x.want)
			}
		})
	}
}

// What a container sends must not reach out of the destination.
func TestExtractHostile(t *testing.T) {
	for name, list := range map[string][]entry{
		"dotdot":               {file("d/../../outside/f", "evil")},
		"dotdot in the middle": {dir("d/"), file("d/x/../../../outside/f", "evil")},
		"other root":           {file("other", "evil")},
		"prefix of the name":   {file("dd/f", "evil")},
		"through a link":       {dir("d/"), sym("d/l", "../../outside"), file("d/l/f", "evil")},
		"through an abs link":  {dir("d/"), sym("d/l", "OUTSIDE"), file("d/l/f", "evil")},
		"hard link out":        {dir("d/"), hard("d/h", "d/../../outside/secret")},
		"hard link elsewhere":  {dir("d/"), hard("d/h", "/outside/secret")},
		"link over a dir":      {dir("d/"), dir("d/x/"), sym("d/x", "/etc")},
		"file over a dir":      {dir("d/"), dir("d/x/"), file("d/x", "evil")},
		"dir over a file":      {dir("d/"), file("d/x", "1"), dir("d/x/")},
		"link as the root":     {sym("d", "OUTSIDE"), file("d/f", "evil")},
		"link chain":           {dir("d/"), sym("d/a", ".."), sym("d/b", "a/../outside"), file("d/b/f", "evil")},
	} {
		t.Run(name, func(t *testing.T) {
			top := t.TempDir()
			outside, root := filepath.Join(top, "outside"), filepath.Join(top, "root")
			os.Mkdir(outside, 0o755)
			os.Mkdir(root, 0o755)
			os.WriteFile(filepath.Join(outside, "secret"), []byte("s"), 0o600)
			for i := range list {
				list[i].link = strings.ReplaceAll(list[i].link, "OUTSIDE", outside)
			}
			err := Extract(archive(t, list...), root, ExtractOptions{From: "d", To: "d"})
			if err == nil {
				t.Errorf("no error; made %s", listing(t, root))
			}
			if got := listing(t, outside); got != "secret=s" {
				t.Errorf("outside is now %s", got)
			}
		})
	}
}

// A file that is replaced is replaced, not written through.
func TestExtractOverLinks(t *testing.T) {
	top := t.TempDir()
	root := filepath.Join(top, "root")
	os.Mkdir(root, 0o755)
	victim := filepath.Join(top, "victim")
	os.WriteFile(victim, []byte("v"), 0o600)
	os.Symlink(victim, filepath.Join(root, "s"))
	os.Link(victim, filepath.Join(root, "h"))
	if err := Extract(archive(t, file("s", "new"), file("h", "new")), root, ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(victim); string(b) != "v" {
		t.Errorf("the victim holds %q", b)
	}
	if got := listing(t, root); got != "h=new s=new" {
		t.Error(got)
	}
}

func TestExtractModes(t *testing.T) {
	root := t.TempDir()
	list := []entry{{name: "d/", typ: tar.TypeDir, mode: 0o555}, {name: "d/f", typ: tar.TypeReg, mode: 0o4755, data: "x"}}
	if err := Extract(archive(t, list...), root, ExtractOptions{}); err != nil {
		t.Fatal(err)
	}
	st, _ := os.Stat(filepath.Join(root, "d/f"))
	if st.Mode() != 0o755 || st.ModTime().Unix() != 1e9 {
		t.Errorf("%v %v", st.Mode(), st.ModTime())
	}
	st, _ = os.Stat(filepath.Join(root, "d"))
	if st.Mode().Perm() != 0o555 || st.ModTime().Unix() != 1e9 {
		t.Errorf("%v %v", st.Mode(), st.ModTime())
	}
	os.Chmod(filepath.Join(root, "d"), 0o755)
	if os.Getuid() == 0 {
		if err := Extract(archive(t, list...), root, ExtractOptions{Owners: true}); err != nil {
			t.Fatal(err)
		}
		if st, _ := os.Stat(filepath.Join(root, "d/f")); st.Mode() != 0o755|fs.ModeSetuid {
			t.Errorf("with owners: %v", st.Mode())
		}
		os.Chmod(filepath.Join(root, "d"), 0o755)
	}
}

func TestExtractSkips(t *testing.T) {
	root := t.TempDir()
	warned := 0
	list := []entry{{name: "dev", typ: tar.TypeChar}, {name: "pipe", typ: tar.TypeFifo}, file("f", "1")}
	if err := Extract(archive(t, list...), root, ExtractOptions{Warn: func(string) { warned++ }}); err != nil || warned != 2 {
		t.Errorf("%d %v", warned, err)
	}
	if got := listing(t, root); got != "f=1" {
		t.Error(got)
	}
}

func TestPackAndExtract(t *testing.T) {
	src := t.TempDir()
	os.MkdirAll(filepath.Join(src, "a/b"), 0o755)
	os.WriteFile(filepath.Join(src, "a/f"), []byte("data"), 0o640)
	os.Symlink("f", filepath.Join(src, "a/l"))
	os.Symlink("/nowhere", filepath.Join(src, "a/dangling"))
	os.Link(filepath.Join(src, "a/f"), filepath.Join(src, "a/g"))
	var b bytes.Buffer
	if err := Pack(&b, filepath.Join(src, "a"), "renamed", nil); err != nil {
		t.Fatal(err)
	}
	dst := t.TempDir()
	if err := Extract(&b, dst, ExtractOptions{From: "renamed", To: "out"}); err != nil {
		t.Fatal(err)
	}
	if got, want := listing(t, dst), "out/ out/b/ out/dangling->/nowhere out/f=data out/g=data out/l->f"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	one, _ := os.Stat(filepath.Join(dst, "out/f"))
	two, _ := os.Stat(filepath.Join(dst, "out/g"))
	if !os.SameFile(one, two) || one.Mode() != 0o640 {
		t.Errorf("%v %v", one.Mode(), os.SameFile(one, two))
	}
}

func FuzzExtract(f *testing.F) {
	f.Add([]byte("d/f"), []byte("../x"), byte('2'))
	f.Fuzz(func(t *testing.T, name, link []byte, typ byte) {
		top := t.TempDir()
		root := filepath.Join(top, "root")
		os.Mkdir(root, 0o755)
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range []tar.Header{{Name: string(name), Linkname: string(link), Typeflag: typ, Mode: 0o777}, {Name: string(name) + "/x", Typeflag: tar.TypeReg, Mode: 0o777}} {
			if w.WriteHeader(&h) != nil {
				return
			}
		}
		w.Close()
		Extract(&b, root, ExtractOptions{})
		if got, _ := os.ReadDir(top); len(got) != 1 {
			t.Errorf("beside the root: %v", got)
		}
	})
}
