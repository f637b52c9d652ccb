package vm

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// systemdPackages are Debian's beside the least there is; a change makes a new root.
const systemdPackages = "systemd,dbus,jq,nftables,iproute2,kmod,procps"

// systemdRoot is a Debian with systemd, kept in the cache.
func systemdRoot(t *testing.T) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = t.TempDir()
	}
	root := filepath.Join(cache, "servin-test", "debian-"+strings.ReplaceAll(systemdPackages, ",", "-"))
	if _, err := os.Stat(root); err == nil {
		return root
	}
	if _, err := exec.LookPath("debootstrap"); err != nil {
		t.Skip("SKIP: debootstrap is not installed")
	}
	fresh := root + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("debootstrap", "--variant=minbase", "--include="+systemdPackages, "bookworm", fresh, "http://deb.debian.org/debian").CombinedOutput(); err != nil {
		t.Skipf("SKIP: Debian is not to be had: %v: %s", err, out[max(0, len(out)-500):])
	}
	for _, dir := range []string{"var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"} {
		if err := os.RemoveAll(filepath.Join(fresh, dir)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Rename(fresh, root); err != nil {
		t.Fatal(err)
	}
	return root
}

// TestSystemd runs containers in scopes of a real systemd: those of the OCI
// runtime command, and those of an engine that is a unit itself.
func TestSystemd(t *testing.T) {
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the boot with systemd is part of make test-long")
	}
	root, dir := systemdRoot(t), t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "checks"), os.DirFS("testdata/systemd")); err != nil {
		t.Fatal(err)
	}
	unit, err := os.ReadFile("../../packaging/servind.service")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "checks", "servind.service"), unit, 0o644); err != nil {
		t.Fatal(err)
	}
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	disk := filepath.Join(dir, "disk")
	if f, err := os.Create(disk); err != nil {
		t.Fatal(err)
	} else if err := f.Truncate(2 << 30); err != nil {
		t.Fatal(err)
	} else if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-d", root, disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	t.Setenv("SMOKE_CHECKS", filepath.Join(dir, "checks"))
	t.Setenv("SMOKE_DISK", disk)
	t.Setenv("SMOKE_EXTRA", filepath.Join(bin, "servin-runtime"))
	t.Setenv("SMOKE_MODULES", "autofs4")
	t.Setenv("SMOKE_APPEND", "systemd.unit=checks.service")
	t.Setenv("SMOKE_TIMEOUT", "600")
	said := boot(t)
	t.Log(said)
	script, err := fs.ReadFile(os.DirFS("testdata/systemd"), "inside")
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Count(string(script), "\ncheck ")
	if strings.Contains(said, "SMOKE FAILED") || strings.Count(said, "SMOKE ok") != want || !strings.Contains(said, "SMOKE done") {
		t.Errorf("the boot with systemd failed: %d of %d checks passed", strings.Count(said, "SMOKE ok"), want)
	}
}
