package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestMain(m *testing.M) {
	if os.Args[0] == Argv0 {
		os.Exit(Main(os.Args))
	}
	os.Exit(m.Run())
}

var bounds = Limits{Bytes: 1 << 30, Entries: 10_000}

// hdr makes tar headers short to write.
type hdr struct {
	tar.Header
	body string
}

func ent(name string, typ byte, link, body string) hdr {
	mode := int64(0o644)
	if typ == tar.TypeDir {
		mode = 0o755
	}
	return hdr{tar.Header{Name: name, Typeflag: typ, Linkname: link, Mode: mode, Size: int64(len(body)), ModTime: time.Unix(1600000000, 0)}, body}
}

func reg(name, body string) hdr { return ent(name, tar.TypeReg, "", body) }
func dir(name string) hdr       { return ent(name, tar.TypeDir, "", "") }
func sym(name, to string) hdr   { return ent(name, tar.TypeSymlink, to, "") }
func hard(name, to string) hdr  { return ent(name, tar.TypeLink, to, "") }

func (h hdr) with(f func(*tar.Header)) hdr { f(&h.Header); return h }

func pack(t testing.TB, hs ...hdr) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range hs {
		if err := w.WriteHeader(&h.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, h.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: unpacking needs root")
	}
}

// apply runs Apply in this process on a new directory.
func apply(t testing.TB, data []byte, lowers ...string) (string, Result, error) {
	t.Helper()
	target := filepath.Join(t.TempDir(), "root")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(target)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var low []int
	for _, l := range lowers {
		lf, err := os.Open(l)
		if err != nil {
			t.Fatal(err)
		}
		defer lf.Close()
		low = append(low, int(lf.Fd()))
	}
	res, err := Apply(context.Background(), int(f.Fd()), low, bytes.NewReader(data), bounds, false)
	return target, res, err
}

// tree lists what is under a directory: name, kind, mode, and content or target.
func tree(t testing.TB, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == root {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		fi, err := d.Info()
		if err != nil {
			return err
		}
		line := rel + " " + fi.Mode().String()
		switch {
		case fi.Mode().IsRegular() && fi.Size() < 100:
			b, _ := os.ReadFile(p)
			line += " " + string(b)
		case fi.Mode()&fs.ModeSymlink != 0:
			l, _ := os.Readlink(p)
			line += " -> " + l
		case fi.Mode()&fs.ModeCharDevice != 0:
			var st unix.Stat_t
			_ = unix.Lstat(p, &st)
			line += fmt.Sprintf(" %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestApply(t *testing.T) {
	needRoot(t)
	unix.Umask(0)
	for name, c := range map[string]struct {
		in      []hdr
		want    []string
		implied []string
		opaque  []string
	}{
		"plain":              {in: []hdr{dir("a"), reg("a/f", "x"), sym("l", "a/f"), hard("h", "a/f")}, want: []string{"a drwxr-xr-x", "a/f -rw-r--r-- x", "h -rw-r--r-- x", "l Lrwxrwxrwx -> a/f"}},
		"leading slash, dot": {in: []hdr{reg("/a", "1"), reg("./b", "2"), dir("./")}, want: []string{"a -rw-r--r-- 1", "b -rw-r--r-- 2"}},
		"inner dots":         {in: []hdr{reg("a/../b", "2")}, want: []string{"b -rw-r--r-- 2"}},
		"implied":            {in: []hdr{reg("a/b/f", "x"), dir("c"), reg("c/f", "y")}, want: []string{"a drwxr-xr-x", "a/b drwxr-xr-x", "a/b/f -rw-r--r-- x", "c drwxr-xr-x", "c/f -rw-r--r-- y"}, implied: []string{"a", "a/b"}},
		"described later":    {in: []hdr{reg("a/f", "x"), dir("a").with(func(h *tar.Header) { h.Mode = 0o700 })}, want: []string{"a drwx------", "a/f -rw-r--r-- x"}},
		"whiteout":           {in: []hdr{dir("d"), reg("d/.wh.gone", "")}, want: []string{"d drwxr-xr-x", "d/gone Dc--------- 0:0"}},
		"opaque":             {in: []hdr{dir("d"), reg("d/.wh..wh..opq", ""), reg("d/f", "x")}, want: []string{"d drwxr-xr-x", "d/f -rw-r--r-- x"}, opaque: []string{"d"}},
		"aufs":               {in: []hdr{reg(".wh..wh.plnk", ""), reg(".wh..wh.orph/x", "")}, want: []string{".wh..wh.orph drwxr-xr-x", ".wh..wh.orph/x -rw-r--r-- "}, implied: []string{".wh..wh.orph"}},
		"whiteout, then new": {in: []hdr{reg(".wh.d", ""), dir("d"), reg(".wh.f", ""), reg("f", "x")}, want: []string{"d drwxr-xr-x", "f -rw-r--r-- x"}, opaque: []string{"d"}},
		"new, then whiteout": {in: []hdr{dir("d"), reg(".wh.d", ""), reg("f", "x"), reg(".wh.f", "")}, want: []string{"d drwxr-xr-x", "f -rw-r--r-- x"}, opaque: []string{"d"}},
		"whiteout, implied":  {in: []hdr{reg(".wh.d", ""), reg("d/f", "x")}, want: []string{"d drwxr-xr-x", "d/f -rw-r--r-- x"}, opaque: []string{"d"}},
		"kinds replaced":     {in: []hdr{reg("a", "x"), dir("a"), reg("a/f", "y"), sym("a", "b"), reg("a", "z")}, want: []string{"a -rw-r--r-- z"}},
		"setuid and sticky":  {in: []hdr{reg("s", "x").with(func(h *tar.Header) { h.Mode, h.Uid = 0o4755, 5 }), dir("t").with(func(h *tar.Header) { h.Mode = 0o1777 })}, want: []string{"s urwxr-xr-x x", "t dtrwxrwxrwx"}},
		"nodes":              {in: []hdr{ent("null", tar.TypeChar, "", "").with(func(h *tar.Header) { h.Devmajor, h.Devminor = 1, 3 }), ent("p", tar.TypeFifo, "", "")}, want: []string{"null Dcrw-r--r-- 1:3", "p prw-r--r--"}},
		"link through link":  {in: []hdr{dir("usr/lib"), sym("lib", "usr/lib"), reg("lib/x", "x")}, want: []string{"lib Lrwxrwxrwx -> usr/lib", "usr drwxr-xr-x", "usr/lib drwxr-xr-x", "usr/lib/x -rw-r--r-- x"}, implied: []string{"usr"}},
		"absolute link":      {in: []hdr{sym("e", "/etc"), dir("etc"), reg("e/passwd", "mine")}, want: []string{"e Lrwxrwxrwx -> /etc", "etc drwxr-xr-x", "etc/passwd -rw-r--r-- mine"}},
		"climbing link":      {in: []hdr{dir("d"), sym("d/up", "../../../../.."), reg("d/up/f", "mine")}, want: []string{"d drwxr-xr-x", "d/up Lrwxrwxrwx -> ../../../../..", "f -rw-r--r-- mine"}},
		"dangling parent":    {in: []hdr{sym("d", "/nowhere"), reg("d/f", "x")}, want: []string{"d drwxr-xr-x", "d/f -rw-r--r-- x"}, implied: []string{"d"}},
		"magic link":         {in: []hdr{sym("d", "/proc/self/root/tmp"), reg("d/f", "x")}, want: []string{"d drwxr-xr-x", "d/f -rw-r--r-- x"}, implied: []string{"d"}},
		"hard link to link":  {in: []hdr{sym("l", "/etc/passwd"), hard("h", "l")}, want: []string{"h Lrwxrwxrwx -> /etc/passwd", "l Lrwxrwxrwx -> /etc/passwd"}},
		"link to itself":     {in: []hdr{reg("f", "x"), hard("f", "f")}, want: []string{"f -rw-r--r-- x"}},
		"global header":      {in: []hdr{{Header: tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "g", PAXRecords: map[string]string{"comment": "c"}}}, reg("f", "x")}, want: []string{"f -rw-r--r-- x"}},
	} {
		t.Run(name, func(t *testing.T) {
			root, res, err := apply(t, pack(t, c.in...))
			if err != nil {
				t.Fatal(err)
			}
			if got := tree(t, root); !slices.Equal(got, c.want) {
				t.Errorf("tree\n got %q\nwant %q", got, c.want)
			}
			if !slices.Equal(res.Implied, c.implied) || !slices.Equal(res.Opaque, c.opaque) {
				t.Errorf("implied %q, opaque %q; want %q, %q", res.Implied, res.Opaque, c.implied, c.opaque)
			}
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	needRoot(t)
	many := make([]hdr, bounds.Entries+1)
	for i := range many {
		many[i] = dir(fmt.Sprint("d", i))
	}
	big := reg("big", "")
	big.Size = bounds.Bytes + 1
	var oversized bytes.Buffer
	w := tar.NewWriter(&oversized)
	_ = w.WriteHeader(&big.Header)
	for name, data := range map[string][]byte{
		"climbing name":      pack(t, reg("../f", "x")),
		"climbing deep":      pack(t, reg("a/../../f", "x")),
		"climbing hard link": pack(t, hard("h", "../../etc/passwd")),
		"hard link to root":  pack(t, hard("h", "/")),
		"empty whiteout":     pack(t, reg(".wh.", "")),
		"whiteout of up":     pack(t, reg(".wh...", "")),
		"file as root":       pack(t, reg("./", "x").with(func(h *tar.Header) { h.Name = "." })),
		"unknown type":       pack(t, ent("x", '7', "", "")),
		"many entries":       pack(t, many...),
		"too large":          oversized.Bytes(),
		"cut off":            pack(t, reg("f", strings.Repeat("x", 5000)))[:3000],
		"no tar":             bytes.Repeat([]byte("nonsense"), 200),
		"cut gzip":           gz(t, pack(t, reg("f", strings.Repeat("xyz", 50000))))[:200],
		"hard link nowhere":  nil,
	} {
		t.Run(name, func(t *testing.T) {
			var lowers []string
			if data == nil {
				data, lowers = pack(t, hard("h", "nowhere")), []string{t.TempDir()}
			}
			_, _, err := apply(t, data, lowers...)
			if !fault.Is(err, fault.Invalid) {
				t.Errorf("err = %v, want invalid", err)
			}
		})
	}
}

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, _ = w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

func TestCompressionsAndDigest(t *testing.T) {
	needRoot(t)
	plain := pack(t, reg("f", strings.Repeat("0123456789", 200_000)))
	plain = append(plain, make([]byte, 10<<10)...) // padding after the end counts
	for name, data := range map[string][]byte{"plain": plain, "gzip": gz(t, plain), "zstd": zst(t, plain), "two gzips": append(gz(t, plain[:7000]), gz(t, plain[7000:])...), "two zstds": append(zst(t, plain[:7000]), zst(t, plain[7000:])...)} {
		t.Run(name, func(t *testing.T) {
			root, res, err := apply(t, data)
			if err != nil {
				t.Fatal(err)
			}
			if res.DiffID != digest.FromBytes(plain) || res.Size != 2_000_000 {
				t.Errorf("%+v", res)
			}
			if fi, err := os.Stat(filepath.Join(root, "f")); err != nil || fi.Size() != 2_000_000 {
				t.Errorf("%v %v", fi, err)
			}
		})
	}
}

func TestAttributesAndTimes(t *testing.T) {
	needRoot(t)
	// cap_net_raw+ep, revision 2
	netRaw := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	f := reg("d/f", "x").with(func(h *tar.Header) {
		h.Format, h.Uid, h.Gid = tar.FormatPAX, 12, 34
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": netRaw, "SCHILY.xattr.user.k": "v",
			"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.user.overlay.redirect": "/etc", "SCHILY.xattr.trusted.x": "y", "SCHILY.xattr.security.selinux": "u:r:t"}
	})
	d := dir("d").with(func(h *tar.Header) { h.ModTime = time.Unix(1500000000, 0) })
	old := reg("old", "").with(func(h *tar.Header) { h.Format = tar.FormatPAX; h.ModTime = time.Unix(-5, 0) })
	root, _, err := apply(t, pack(t, d, f, old))
	if err != nil {
		t.Fatal(err)
	}
	p := filepath.Join(root, "d/f")
	buf := make([]byte, 100)
	if n, err := unix.Getxattr(p, "security.capability", buf); err != nil || string(buf[:n]) != netRaw {
		t.Errorf("capability %q %v", buf[:max(n, 0)], err)
	}
	if n, err := unix.Getxattr(p, "user.k", buf); err != nil || string(buf[:n]) != "v" {
		t.Errorf("user.k %v", err)
	}
	for _, no := range []string{"trusted.overlay.opaque", "user.overlay.redirect", "trusted.x"} {
		if _, err := unix.Getxattr(p, no, buf); !errors.Is(err, unix.ENODATA) {
			t.Errorf("%s was set: %v", no, err)
		}
	}
	var st unix.Stat_t
	_ = unix.Lstat(p, &st)
	if st.Uid != 12 || st.Gid != 34 || st.Mtim.Sec != 1600000000 {
		t.Errorf("%+v", st)
	}
	_ = unix.Lstat(filepath.Join(root, "d"), &st)
	if st.Mtim.Sec != 1500000000 {
		t.Errorf("the directory's time is %d", st.Mtim.Sec)
	}
	_ = unix.Lstat(filepath.Join(root, "old"), &st)
	if st.Mtim.Sec != 0 {
		t.Errorf("a time before 1970 became %d", st.Mtim.Sec)
	}
}

func TestSparse(t *testing.T) {
	needRoot(t)
	src := t.TempDir()
	f, err := os.Create(filepath.Join(src, "s"))
	if err != nil {
		t.Fatal(err)
	}
	const size = 600 << 20
	_, _ = f.WriteAt([]byte("begin"), 0)
	_, _ = f.WriteAt([]byte("middle"), 300<<20)
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	f.Close()
	for _, format := range []string{"gnu", "posix"} {
		t.Run(format, func(t *testing.T) {
			data, err := exec.Command("tar", "-C", src, "--format="+format, "-Scf", "-", "s").Output()
			if err != nil {
				t.Skipf("SKIP: no tar command that makes sparse archives: %v", err)
			}
			root, _, err := apply(t, data)
			if err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			_ = unix.Lstat(filepath.Join(root, "s"), &st)
			if st.Size != size || st.Blocks*512 > 1<<20 {
				t.Errorf("size %d, %d bytes on disk", st.Size, st.Blocks*512)
			}
			got, _ := os.Open(filepath.Join(root, "s"))
			defer got.Close()
			b := make([]byte, 6)
			if _, err := got.ReadAt(b, 300<<20); err != nil || string(b) != "middle" {
				t.Errorf("%q %v", b, err)
			}
		})
	}
}

func TestHardLinkBelow(t *testing.T) {
	needRoot(t)
	low := t.TempDir()
	if err := os.MkdirAll(filepath.Join(low, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(low, "d/f"), []byte("below"), 0o640); err != nil {
		t.Fatal(err)
	}
	data := pack(t, hard("h", "d/f"))
	_, res, err := apply(t, data)
	if err != nil || !res.NeedsLower {
		t.Fatalf("%+v %v", res, err)
	}
	root, res, err := apply(t, data, low)
	if err != nil || res.NeedsLower {
		t.Fatalf("%+v %v", res, err)
	}
	if got, want := tree(t, root), []string{"d drwxr-xr-x", "d/f -rw-r----- below", "h -rw-r----- below"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestChildIsConfined(t *testing.T) {
	needRoot(t)
	base := t.TempDir()
	target := filepath.Join(base, "root")
	if err := os.Mkdir(target, 0o755); err != nil {
		t.Fatal(err)
	}
	d, _ := os.Open(target)
	defer d.Close()
	plain := pack(t, dir("d"), reg("d/f", "x").with(func(h *tar.Header) { h.Uid = 1000 }), reg("d/.wh..wh..opq", ""))
	res, err := Run(context.Background(), Job{Layer: bytes.NewReader(gz(t, plain)), Target: d, Limits: bounds})
	if err != nil {
		t.Fatal(err)
	}
	if res.DiffID != digest.FromBytes(plain) || !slices.Equal(res.Opaque, []string{"d"}) {
		t.Errorf("%+v", res)
	}
	if _, err := Run(context.Background(), Job{Layer: bytes.NewReader(pack(t, reg("../x", ""))), Target: d, Limits: bounds}); !fault.Is(err, fault.Invalid) {
		t.Errorf("kind lost on the way from the child: %v", err)
	}
	// A child that waits for its input dies with the context.
	pr, pw, _ := os.Pipe()
	defer pw.Close()
	defer pr.Close()
	ctx, cancel := context.WithCancel(context.Background())
	got := make(chan error, 1)
	go func() {
		_, err := Run(ctx, Job{Layer: pr, Target: d, Limits: bounds})
		got <- err
	}()
	pid := childOf(t)
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", fmt.Sprintf("CapEff:\t%016x", keep), "CapPrm:\t" + fmt.Sprintf("%016x", keep)} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the child's status lacks %q", want)
		}
	}
	if root, _ := os.Readlink(fmt.Sprintf("/proc/%d/root", pid)); root != target {
		t.Errorf("the child's root is %q", root)
	}
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
}

// childOf waits for a child of this process that is confined.
func childOf(t *testing.T) int {
	t.Helper()
	for range 500 {
		tasks, _ := filepath.Glob("/proc/self/task/*/children")
		for _, c := range tasks {
			b, _ := os.ReadFile(c)
			for _, f := range strings.Fields(string(b)) {
				st, _ := os.ReadFile("/proc/" + f + "/status")
				if strings.Contains(string(st), "Seccomp:\t2") {
					var pid int
					_, _ = fmt.Sscan(f, &pid)
					return pid
				}
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("no confined child appeared")
	return 0
}

// FuzzApply feeds anything to Apply and looks that nothing beside the target
// changes.
func FuzzApply(f *testing.F) {
	if os.Getuid() != 0 {
		f.Skip("SKIP: unpacking needs root")
	}
	for _, hs := range [][]hdr{
		{dir("a"), reg("a/f", "x"), sym("l", "/etc"), reg("l/f", "y"), hard("h", "a/f")},
		{reg("a/.wh..wh..opq", ""), reg(".wh.x", ""), ent("p", tar.TypeFifo, "", "")},
		{sym("d", "../../.."), reg("d/canary", "overwritten"), hard("h", "d/canary")},
	} {
		b := pack(f, hs...)
		f.Add(b)
		f.Add(gz(f, b))
		f.Add(zst(f, b))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		base := t.TempDir()
		canary := filepath.Join(base, "canary")
		if err := os.WriteFile(canary, []byte("alive"), 0o600); err != nil {
			t.Fatal(err)
		}
		target := filepath.Join(base, "root")
		if err := os.Mkdir(target, 0o755); err != nil {
			t.Fatal(err)
		}
		d, err := os.Open(target)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		_, _ = Apply(context.Background(), int(d.Fd()), nil, bytes.NewReader(data), Limits{Bytes: 8 << 20, Entries: 200}, false)
		if b, err := os.ReadFile(canary); err != nil || string(b) != "alive" {
			t.Fatalf("the canary is %q, %v", b, err)
		}
		var st unix.Stat_t
		if err := unix.Lstat(canary, &st); err != nil || st.Nlink != 1 || st.Mode&0o7777 != 0o600 || st.Uid != 0 {
			t.Fatalf("the canary changed: %+v, %v", st, err)
		}
		if ents, err := os.ReadDir(base); err != nil || len(ents) != 2 {
			t.Fatalf("%d entries beside the target, %v", len(ents)-1, err)
		}
	})
}
