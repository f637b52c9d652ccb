package native

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// mountsBelow counts the host's mounts below a path.
func mountsBelow(path string) int {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	return strings.Count(string(b), " "+path)
}

func TestVolumeKinds(t *testing.T) {
	e := start(t)
	vols := e.Dir + "/root/volumes"

	// Mounted when the first container uses it, until the last one ends; a killed
	// engine neither forgets nor doubles it.
	e.must("volumes", "create", "-o", "type=tmpfs", "-o", "device=tmpfs", "-o", "o=size=1m,mode=0750,uid=7", "mem")
	if n := mountsBelow(vols + "/mem"); n != 0 {
		t.Errorf("mounted without a user: %d", n)
	}
	e.must("run", "-d", "--name", "one", "-v", "mem:/m", "bb", "sleep", "1000")
	e.must("run", "-d", "--name", "two", "-v", "mem:/m", "bb", "sleep", "1000")
	e.must("exec", "one", "sh", "-c", "echo shared > /m/f")
	if out := e.must("exec", "two", "sh", "-c", "cat /m/f; stat -c '%a %u' /m; dd if=/dev/zero of=/m/big bs=1k count=2000 2>/dev/null || echo full"); out != "shared\n750 7\nfull" {
		t.Errorf("the tmpfs: %q", out)
	}
	e.must("rm", "-f", "one")
	e.Kill()
	e.Boot()
	if n := mountsBelow(vols + "/mem"); n != 1 {
		t.Errorf("%d mounts with one user after a restart", n)
	}
	if out := e.must("exec", "two", "cat", "/m/f"); out != "shared" {
		t.Errorf("after a restart: %q", out)
	}
	e.must("rm", "-f", "two")
	harness.Eventually(t, "the last user's end unmounts it", 5*time.Second, func() bool { return mountsBelow(vols+"/mem") == 0 })

	// A directory of the host by name, and file systems that cannot be had.
	if err := os.MkdirAll(e.Dir+"/data/sub", 0o755); err != nil {
		t.Fatal(err)
	}
	e.must("volumes", "create", "-o", "type=none", "-o", "o=bind", "-o", "device="+e.Dir+"/data", "named")
	e.must("run", "--rm", "-v", "named:/d", "bb", "sh", "-c", "echo x > /d/sub/f")
	if b, err := os.ReadFile(e.Dir + "/data/sub/f"); err != nil || string(b) != "x\n" {
		t.Errorf("through the named bind: %q %v", b, err)
	}
	for _, o := range []string{"type=nfs,device=:/x,o=addr=127.0.0.1", "type=cifs,device=//127.0.0.1/x,o=username=u"} {
		args := []string{"volumes", "create"}
		for _, p := range strings.SplitN(o, ",", 3) {
			args = append(args, "-o", p)
		}
		name := "net" + o[5:8]
		e.must(append(args, name)...)
		if r := e.run("run", "--rm", "-v", name+":/d", "bb", "true"); r.code != 125 || !strings.Contains(r.err, "error while mounting volume") {
			t.Errorf("%s: %s", o, r)
		}
		e.must("volumes", "rm", name)
	}
	e.must("volumes", "create", "-o", "type=cifs", "-o", "device=//h/x", "-o", "o=username=u,password=hunter2", "smb")
	if r := e.run("volumes", "inspect", "smb"); strings.Contains(r.out, "hunter2") || !strings.Contains(r.out, "password=***") {
		t.Errorf("inspect: %s", r)
	}

	// Parts of volumes: links cannot lead out.
	e.must("run", "--rm", "-v", "tree:/t", "bb", "sh", "-c", "mkdir -p /t/a/b && echo deep > /t/a/b/f && ln -s / /t/root && ln -s ../../../../etc /t/a/up && ln -s b /t/a/link")
	for sub, want := range map[string]string{"a/b": "deep", "a/link": "deep"} {
		if out := e.must("run", "--rm", "--mount", "type=volume,source=tree,target=/s,volume-subpath="+sub, "bb", "cat", "/s/f"); out != want {
			t.Errorf("subpath %s: %q", sub, out)
		}
	}
	for _, sub := range []string{"a/up", "none", "../tree", "/etc", "root/a/b"} {
		r := e.run("run", "--rm", "--mount", "type=volume,source=tree,target=/s,volume-subpath="+sub, "bb", "cat", "/s/passwd")
		if r.code == 0 {
			t.Errorf("subpath %s: %s", sub, r)
		}
	}

	// Images as mounts, owners, no copy.
	e.must("commit", "--change", "LABEL x=y", e.must("create", "bb", "true"), "img")
	if out := e.must("run", "--rm", "--mount", "type=image,source=img,target=/i", "--mount", "type=image,source=img,target=/e,image-subpath=etc", "bb", "sh", "-c",
		"cat /e/group | head -1; test -x /i/bin/busybox && echo there; echo x > /i/new || echo read-only"); out != "root:x:0:\nthere\nread-only" {
		t.Errorf("image mounts: %q", out)
	}
	// What is mounted stays for the container: it counts as used, and outlives its name.
	e.must("run", "--name", "shows", "--mount", "type=image,source=img,target=/i", "bb", "cat", "/i/etc/group")
	if r := e.run("rmi", "img"); r.code == 0 || !strings.Contains(r.err, "is using its referenced image") {
		t.Errorf("removal of a mounted image: %s", r)
	}
	e.must("rmi", "-f", "img")
	e.Kill()
	e.Boot()
	if out := e.must("start", "-a", "shows"); !strings.HasPrefix(out, "root:x:0:") {
		t.Errorf("without its name: %q", out)
	}
	e.must("rm", "shows")
	if l := glob(e.Dir + "/root/*/rw/*-image-*"); len(l) > 0 {
		t.Errorf("left: %v", l)
	}
	e.must("run", "--rm", "-v", "parts:/p", "bb", "mkdir", "/p/etc")
	if out := e.must("run", "--rm", "--mount", "type=volume,source=parts,target=/etc,volume-subpath=etc", "bb", "ls", "/etc"); !strings.Contains(out, "passwd") {
		t.Errorf("an empty part of a volume is not filled: %q", out)
	}
	if out := e.must("run", "--rm", "--user", "1000:1000", "-v", "own:/o:U", "bb", "sh", "-c", "echo x > /o/f && stat -c '%u:%g' /o /o/f"); out != "1000:1000\n1000:1000" {
		t.Errorf(":U gave %q", out)
	}
	if out := e.must("run", "--rm", "-v", "bare:/etc:nocopy", "bb", "ls", "-A", "/etc"); strings.Contains(out, "passwd") {
		t.Errorf("nocopy copied: %q", out)
	}
	if out := e.must("run", "--rm", "-v", "filled:/etc", "bb", "ls", "/etc"); !strings.Contains(out, "passwd") {
		t.Errorf("a new volume is not filled: %q", out)
	}

	// Usage and pruning.
	e.must("run", "--rm", "-v", "sized:/s", "bb", "dd", "if=/dev/zero", "of=/s/f", "bs=1M", "count=3")
	df := e.must("system", "df", "-v")
	if i := strings.Index(df, "sized"); i < 0 || !strings.Contains(strings.SplitN(df[i:], "\n", 2)[0], "3.15MB") {
		t.Errorf("df -v: %s", df)
	}
	e.must("volumes", "create", "--label", "keep=1", "kept")
	e.must("run", "-d", "--name", "user", "-v", "sized:/s", "-v", "/anon", "bb", "sleep", "1000")
	if out := e.must("volumes", "prune", "-f", "--filter", "all=1", "--filter", "until=1h"); strings.Contains(out, "tree") {
		t.Errorf("until: %s", out)
	}
	out := e.must("volumes", "prune", "-f", "--filter", "all=true", "--filter", "label!=keep")
	for _, n := range []string{"tree", "mem", "named", "smb", "own"} {
		if !strings.Contains(out, n) {
			t.Errorf("prune left %s: %s", n, out)
		}
	}
	if strings.Contains(out, "kept") || strings.Contains(out, "sized") {
		t.Errorf("prune took too much: %s", out)
	}
	if _, err := os.Stat(e.Dir + "/data/sub/f"); err != nil {
		t.Errorf("removing a named bind removed what it binds: %v", err)
	}
	if r := e.run("volumes", "prune", "-f", "--filter", "until=whenever"); r.code == 0 {
		t.Errorf("a bad filter: %s", r)
	}
	e.must("rm", "-f", "-v", "user")
}
