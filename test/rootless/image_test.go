package rootless

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// entry is a file of a root file system.
type entry struct {
	name, link string
	mode       int64
	typ        byte
	data       []byte
	id         int
	xattr      map[string]string
}

// rootfs is busybox with two users, and what else is given.
func rootfs(t *testing.T, more ...entry) []byte {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("SKIP: busybox is not installed")
	}
	busybox, err := os.ReadFile(path)
	must(t, err)
	list, err := exec.Command(path, "--list").Output()
	must(t, err)
	all := []entry{{name: "bin/busybox", mode: 0o755, data: busybox}}
	for _, d := range []string{"bin/", "etc/", "proc/", "sys/", "dev/", "root/", "srv/"} {
		all = append([]entry{{name: d, mode: 0o755, typ: tar.TypeDir}}, all...)
	}
	all = append(all, entry{name: "tmp/", mode: 0o1777, typ: tar.TypeDir})
	for _, a := range strings.Fields(string(list)) {
		if a != "busybox" {
			all = append(all, entry{name: "bin/" + a, link: "busybox", typ: tar.TypeSymlink})
		}
	}
	all = append(all,
		entry{name: "etc/passwd", mode: 0o644, data: []byte("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/srv:/bin/sh\n")},
		entry{name: "etc/group", mode: 0o644, data: []byte("root:x:0:\nweb:x:1000:\nextra:x:2000:web\n")},
		entry{name: "srv/hello", mode: 0o644, data: []byte("hello from inside\n")})
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range append(all, more...) {
		h := &tar.Header{Name: e.name, Mode: e.mode, Typeflag: e.typ, Linkname: e.link, Size: int64(len(e.data)), Uid: e.id, Gid: e.id,
			ModTime: time.Unix(1e9, 0), Format: tar.FormatPAX}
		if e.typ == 0 {
			h.Typeflag = tar.TypeReg
		}
		if e.typ == tar.TypeChar {
			h.Devmajor, h.Devminor = 1, 3
		}
		for k, v := range e.xattr {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		must(t, w.WriteHeader(h))
		_, err := w.Write(e.data)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// importImage makes an image of a root file system.
func (u *user) importImage(name string, fs []byte) {
	u.t.Helper()
	if r := u.pipe(io.Reader(bytes.NewReader(fs)), "import", "-", name); r.code != 0 {
		u.t.Fatalf("import: %s\n%s", r, u.log())
	}
}
