package osimage

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/osimage"
	"github.com/cloudos-io/cloudos/internal/slots"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

const (
	secureCode    = "/usr/share/OVMF/OVMF_CODE_4M.secboot.fd"
	microsoftVars = "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"
	emptyVars     = "/usr/share/OVMF/OVMF_VARS_4M.fd"

	espAt   = 2 << 20 // of the boot partition on a disk, in bytes
	espEnd  = 162 << 20
	slotLen = 192 << 20
)

// secure are QEMU's flags for UEFI with Secure Boot and a file of variables, which is copied.
func secure(t *testing.T, vars string) []string {
	t.Helper()
	needs(t, secureCode, vars)
	own := filepath.Join(t.TempDir(), "vars")
	copyFile(t, own, vars)
	// Only firmware in system management mode may write the variables.
	return []string{"-machine", "q35,smm=on", "-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1",
		"-drive", "if=pflash,format=raw,readonly=on,file=" + secureCode, "-drive", "if=pflash,format=raw,file=" + own}
}

func copyFile(t *testing.T, to, from string) {
	t.Helper()
	if out, err := exec.Command("cp", "--sparse=always", from, to).CombinedOutput(); err != nil {
		t.Fatalf("cp: %v\n%s", err, out)
	}
}

// bootDisk starts a disk.
func bootDisk(t *testing.T, disk string, limit time.Duration, more ...string) *machine {
	t.Helper()
	return start(t, limit, append([]string{"-drive", "file=" + disk + ",format=raw,if=none,id=d,discard=unmap", "-device", "virtio-blk-pci,drive=d,bootindex=0"}, more...)...)
}

// tpm starts a TPM for one machine; its state is kept in dir.
func tpm(t *testing.T, dir string) []string {
	t.Helper()
	needs(t, "swtpm")
	sock := filepath.Join(dir, "s")
	os.Remove(sock)
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, "swtpm", "socket", "--tpm2", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+sock, "--terminate")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); cmd.Wait() })
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("swtpm does not start: %s", out.String())
		}
	}
	return []string{"-chardev", "socket,id=tpmc,path=" + sock, "-tpmdev", "emulator,id=tpm0,chardev=tpmc", "-device", "tpm-crb,tpmdev=tpm0"}
}

// flip changes one byte of a file.
func flip(t *testing.T, p string, at int64) {
	t.Helper()
	f, err := os.OpenFile(p, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// find returns where bytes are in the boot partition of a disk.
func find(t *testing.T, disk string, want []byte) int64 {
	t.Helper()
	at := bytes.Index(region(t, disk, espAt, espEnd-espAt), want)
	if at < 0 {
		t.Fatalf("the boot partition has no %q", want)
	}
	return espAt + int64(at)
}

// fileAt returns where the first file is that has bytes at a place of it. Boot loaders
// have the same bytes in their code, but files begin at sectors.
func fileAt(t *testing.T, disk, want string, place int) int64 {
	t.Helper()
	b := region(t, disk, espAt, espEnd-espAt)
	for at := 0; at+place < len(b); at += 512 {
		if bytes.HasPrefix(b[at+place:], []byte(want)) {
			return espAt + int64(at)
		}
	}
	t.Fatalf("the boot partition has no file with %q at %d", want, place)
	return 0
}

// kernelAt and initrdAt are where those are; in the owner's mode they are parts of a program.
func kernelAt(t *testing.T, disk string) int64 { return fileAt(t, disk, "HdrS", 0x202) }
func initrdAt(t *testing.T, disk string) int64 { return fileAt(t, disk, "\x28\xb5\x2f\xfd", 0) }

func region(t *testing.T, p string, at, n int64) []byte {
	t.Helper()
	f, err := os.Open(p)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := io.ReadFull(io.NewSectionReader(f, at, n), b); err != nil {
		t.Fatal(err)
	}
	return b
}

func overwrite(t *testing.T, p string, at int64, b []byte) {
	t.Helper()
	f, err := os.OpenFile(p, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

var diskOnce struct {
	sync.Mutex
	dir string
}

// plainDisk is a copy of one image of the format disk for all tests.
func plainDisk(t *testing.T) string {
	t.Helper()
	needs(t, "grub-mkimage")
	diskOnce.Lock()
	defer diskOnce.Unlock()
	if diskOnce.dir == "" {
		from := build(t, "disk", nil)
		dir, err := os.MkdirTemp("", "osimage")
		if err != nil {
			t.Fatal(err)
		}
		copyFile(t, filepath.Join(dir, "disk.raw"), filepath.Join(from, "disk.raw"))
		diskOnce.dir = dir
	}
	p := filepath.Join(t.TempDir(), "disk.raw")
	copyFile(t, p, filepath.Join(diskOnce.dir, "disk.raw"))
	return p
}

// changeInitrd changes the initial file system of a disk so that it does the same:
// in the zeros that fill it up behind its end.
func changeInitrd(t *testing.T, disk string) {
	t.Helper()
	at := initrdAt(t, disk)
	b := region(t, disk, at, espEnd-at)
	end := kernelAt(t, disk) - at // the next file
	if end < 0 {
		t.Fatal("there is no kernel behind the initial file system")
	}
	for end--; b[end] == 0; end-- {
	}
	if end++; end%512 == 0 {
		t.Fatal("the initial file system has no zeros at its end")
	}
	flip(t, disk, at+end)
}

// ready connects and expects a machine in good order.
func (m *machine) ready() vmwire.Status {
	m.t.Helper()
	m.connect()
	s := m.settled()
	if s.State != vmwire.StateReady || len(s.Problems) > 0 {
		m.t.Fatalf("the machine is %+v", s)
	}
	return s
}

// refused expects that firmware or boot loader says so and no kernel of ours runs.
func (m *machine) refused(says ...string) {
	m.t.Helper()
	for end := time.Now().Add(3 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		said := m.said()
		if strings.Contains(said, "cloudos: ") {
			m.t.Fatal("a changed system runs")
		}
		for _, s := range says {
			if strings.Contains(said, s) {
				m.cmd.Process.Kill()
				return
			}
		}
		if time.Now().After(end) {
			m.t.Fatalf("nobody said %q", says)
		}
	}
}

// TestSecureBootDebian starts Debian's signed chain with Microsoft's keys, and not a
// kernel that was changed.
func TestSecureBootDebian(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage")
	disk := plainDisk(t)
	bad := plainDisk(t)

	m := bootDisk(t, disk, 6*time.Minute, secure(t, microsoftVars)...)
	if s := m.ready(); s.Trust.SecureBoot != vmwire.SecureBootOn || s.Trust.Chain != "debian" || !s.Trust.Verity || s.Trust.Encrypted {
		t.Fatalf("trust is %+v", s.Trust)
	}
	m.off()

	flip(t, bad, kernelAt(t, bad)+5<<20)
	bootDisk(t, bad, 6*time.Minute, secure(t, microsoftVars)...).refused("bad shim signature", "Security Policy Violation")
}

// ownersKeys are an owner's, and OVMF's variables with the certificate alone.
func ownersKeys(t *testing.T) (owner *osimage.Owner, vars string) {
	t.Helper()
	keys := t.TempDir()
	if err := osimage.NewOwner(keys, "test"); err != nil {
		t.Fatal(err)
	}
	owner, err := osimage.LoadOwner(filepath.Join(keys, osimage.OwnerKey), filepath.Join(keys, osimage.OwnerCert))
	if err != nil {
		t.Fatal(err)
	}
	vars = filepath.Join(keys, "vars.fd")
	if err := osimage.EnrollOVMF(emptyVars, vars, owner.Cert); err != nil {
		t.Fatal(err)
	}
	return owner, vars
}

// TestSecureBootOwner starts what the owner signed and nothing else.
func TestSecureBootOwner(t *testing.T) {
	long(t)
	needs(t, "grub-mkimage", emptyVars)
	owner, vars := ownersKeys(t)
	disk := filepath.Join(build(t, "disk", func(o *osimage.Options) { o.Owner = owner }), "disk.raw")
	bad := filepath.Join(t.TempDir(), "bad")

	// The root in the second slot: the system finds it by its hash.
	copyFile(t, bad, disk)
	slot := region(t, bad, espEnd, slotLen)
	overwrite(t, bad, espEnd+slotLen, slot)
	overwrite(t, bad, espEnd, make([]byte, slotLen))
	block, err := slots.State{Good: "b"}.Block()
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, bad, find(t, bad, []byte("# GRUB Environment Block\ngood=a")), block)
	m := bootDisk(t, bad, 6*time.Minute, secure(t, vars)...)
	if s := m.ready(); s.Trust.SecureBoot != vmwire.SecureBootOn || s.Trust.Chain != "owner" || !s.Trust.Verity {
		t.Fatalf("trust is %+v", s.Trust)
	}
	m.off()

	const denied = "Access Denied"
	for name, change := range map[string]func(){
		"command line": func() { flip(t, bad, find(t, bad, []byte("cloudos.boot=unified"))) },
		"initrd":       func() { flip(t, bad, initrdAt(t, bad)+1<<20) },
		"unsigned": func() {
			copyFile(t, bad, plainDisk(t))
		},
	} {
		t.Run(name, func(t *testing.T) {
			copyFile(t, bad, disk)
			change()
			bootDisk(t, bad, 6*time.Minute, secure(t, vars)...).refused(denied, "Security Violation")
		})
	}
	t.Run("Microsoft's keys", func(t *testing.T) {
		bootDisk(t, disk, 6*time.Minute, secure(t, microsoftVars)...).refused(denied, "Security Violation")
	})
}

// TestVerity changes one byte of the root: it cannot be read.
func TestVerity(t *testing.T) {
	long(t)
	disk := plainDisk(t)
	flip(t, disk, espEnd+8)
	m := bootDisk(t, disk, 5*time.Minute)
	m.await("cannot mount the root from /dev/dm-0: input/output error", 4*time.Minute)
}

// TestEncryption encrypts the data at the first boot, opens them with the TPM at the
// second, not for a changed initial file system, and then with the recovery key.
func TestEncryption(t *testing.T) {
	long(t)
	needs(t, "swtpm", "cryptsetup", "xorriso")
	conf := cidata(t, map[string]string{"user-data": "version: 1\nencryption: {key: tpm2, recovery: api}\n", "meta-data": ""})
	disk := plainDisk(t)
	if err := os.Truncate(disk, 3<<30); err != nil {
		t.Fatal(err)
	}
	state, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	firmware := secure(t, microsoftVars)
	boot := func() *machine {
		m := bootDisk(t, disk, 8*time.Minute, append(append(tpm(t, state), firmware...), conf...)...)
		m.connect()
		return m
	}

	m := boot()
	s := m.settled()
	if s.State != vmwire.StateReady || len(s.Problems) > 0 || !s.Trust.TPM || !s.Trust.Encrypted || s.Trust.OpenedBy != "tpm2" || !s.Trust.RecoveryKey {
		t.Fatalf("the first boot: %+v", s)
	}
	if out, err := m.cloudos("status"); err != nil || !strings.Contains(out, "cloudos recovery-key") {
		t.Fatalf("the status is %q, %v", out, err)
	}
	var recovery vmwire.Recovery
	if out, err := m.cloudos("recovery-key"); err != nil || len(out) < 52 {
		t.Fatalf("the recovery key: %v", err)
	} else {
		recovery.Key, _, _ = strings.Cut(out, "\n")
	}
	if err := m.ctl("GET", "/v1/encryption/recovery", nil, nil); err == nil {
		t.Fatal("the recovery key was given out twice")
	}
	if strings.Contains(m.said(), recovery.Key) {
		t.Fatal("the console shows the recovery key")
	}
	if err := m.ctl("PUT", "/v1/config", "version: 1\nhostname: kept-secret-name\nencryption: {key: tpm2}\n", nil); err != nil {
		t.Fatal(err)
	}
	var d vmwire.Disk
	if err := m.ctl("POST", "/v1/data/grow", nil, &d); err != nil || d.Total < 1<<30 {
		t.Fatalf("the data did not grow with the disk: %+v, %v", d, err)
	}
	m.off()

	at := espEnd + 2*slotLen
	part := region(t, disk, int64(at), 600<<20)
	if !bytes.HasPrefix(part, []byte("LUKS\xba\xbe")) || bytes.Contains(part, []byte("kept-secret-name")) {
		t.Fatal("the data partition is readable")
	}
	p := filepath.Join(t.TempDir(), "luks")
	if err := os.WriteFile(p, part[:32<<20], 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("cryptsetup", "open", "--test-passphrase", "--key-file=-", p)
	cmd.Stdin = strings.NewReader(recovery.Key)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cryptsetup with the recovery key: %v\n%s", err, out)
	}

	m = boot()
	if s := m.settled(); s.State != vmwire.StateReady || len(s.Problems) > 0 || s.Trust.OpenedBy != "tpm2" || s.Hostname != "kept-secret-name" {
		t.Fatalf("the second boot: %+v", s)
	}
	m.registersClosed(disk)
	m.off()

	// Another initial file system boots, but the TPM knows.
	changeInitrd(t, disk)
	m = boot()
	s = m.settled()
	if s.State != vmwire.StateSafe || s.Engine.Running || !strings.Contains(strings.Join(s.Problems, ""), "register 9 differs") || s.Trust.OpenedBy != "" {
		t.Fatalf("with a changed initial file system: %+v", s)
	}
	m.await("This is safe mode", time.Minute)
	if err := m.ctl("POST", "/v1/encryption/unlock", vmwire.Unlock{Key: "wrong-key"}, nil); err == nil {
		t.Fatal("a wrong key was taken")
	}
	if err := m.ctl("POST", "/v1/encryption/unlock", vmwire.Unlock(recovery), nil); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-m.done:
		m.done <- err
	case <-time.After(2 * time.Minute):
		t.Fatal("the machine does not start again")
	}
	m = boot()
	if s := m.settled(); s.State != vmwire.StateReady || s.Trust.OpenedBy != "tpm2" || s.Hostname != "kept-secret-name" {
		t.Fatalf("after the recovery: %+v", s)
	}
	m.off()
}

// cidata is a NoCloud volume.
func cidata(t *testing.T, files map[string]string) []string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "f"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, "f", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	iso := filepath.Join(dir, "cidata.iso")
	if out, err := exec.Command("xorriso", "-as", "mkisofs", "-quiet", "-V", "cidata", "-R", "-o", iso, filepath.Join(dir, "f")).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return []string{"-drive", "file=" + iso + ",format=raw,if=none,id=c,readonly=on", "-device", "virtio-blk-pci,drive=c"}
}
