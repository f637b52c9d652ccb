// Package windows runs the command line for Windows under Wine, against an engine on
// this machine: what it prints, what it keeps, and how it connects.
package windows

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

const wine = "/usr/lib/wine/wine64"

// prefix is one of Wine's worlds, with the command line in it.
type prefix struct {
	t        *testing.T
	dir, exe string
}

// world makes a world of the test's own.
func world(t *testing.T) *prefix {
	t.Helper()
	if os.Getenv("SERVIN_LONG") == "" {
		t.Skip("SKIP: the command line for Windows is part of make test-long")
	}
	if runtime.GOARCH != "amd64" {
		t.Skip("SKIP: Wine runs programs for amd64 on amd64 alone")
	}
	if _, err := os.Stat(wine); err != nil {
		t.Skip("SKIP: Wine is not installed (Debian: apt-get install wine64)")
	}
	dir, err := os.MkdirTemp("", "wine")
	if err != nil {
		t.Fatal(err)
	}
	p := &prefix{t: t, dir: dir, exe: filepath.Join(dir, "servin.exe")}
	t.Cleanup(func() {
		end := exec.Command("/usr/lib/wine/wineserver64", "-k")
		end.Env = p.env()
		end.Run()
		if err := os.RemoveAll(dir); err != nil { // its server writes its registry while it ends
			time.Sleep(time.Second)
			os.RemoveAll(dir)
		}
	})
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir, "./cmd/servin", "./cmd/cloudos")
	cmd.Dir, cmd.Env = "../..", append(os.Environ(), "GOOS=windows", "GOARCH=amd64", "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cannot build: %v\n%s", err, out)
	}
	if out, err := p.wine(3*time.Minute, "wineboot.exe", "--init"); err != nil {
		t.Skipf("SKIP: Wine does not start here: %v\n%s", err, out)
	}
	system := filepath.Join(dir, "w", "drive_c", "windows", "system32", "bcryptprimitives.dll")
	if _, err := os.Stat(system); err != nil { // Wine 8 has none, and Go asks it for random numbers
		if err := os.WriteFile(system, forwarder("bcryptprimitives.dll", "ProcessPrng", "advapi32.SystemFunction036"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func (p *prefix) env() []string {
	return []string{"PATH=" + os.Getenv("PATH"), "HOME=" + p.dir, "WINEPREFIX=" + filepath.Join(p.dir, "w"), "WINEDEBUG=-all", "WINEDLLOVERRIDES=mscoree,mshtml,winemenubuilder.exe=d"}
}

func (p *prefix) wine(limit time.Duration, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, wine, args...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = p.env(), p.dir, 5*time.Second
	// A file, not a pipe: Wine's server keeps what it inherits.
	out, err := os.CreateTemp(p.dir, "out-")
	if err != nil {
		p.t.Fatal(err)
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	b, rerr := os.ReadFile(out.Name())
	if rerr != nil {
		p.t.Fatal(rerr)
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n"), err
}

// servin runs the command line.
func (p *prefix) servin(args ...string) (string, error) {
	return p.wine(time.Minute, append([]string{p.exe}, args...)...)
}

// cloudos runs the command line of the operating system.
func (p *prefix) cloudos(args ...string) (string, error) {
	return p.wine(time.Minute, append([]string{filepath.Join(p.dir, "cloudos.exe")}, args...)...)
}

func (p *prefix) must(args ...string) string {
	p.t.Helper()
	out, err := p.servin(args...)
	if err != nil {
		p.t.Fatalf("servin %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// path is a file of this machine's as Windows programs name it.
func path(p string) string { return "Z:" + strings.ReplaceAll(p, "/", `\`) }

// TestCommandLine has the command line for Windows do what needs no engine, and then
// talk to one over TCP with and without TLS.
func TestCommandLine(t *testing.T) {
	p := world(t)
	if out := p.must("--version"); !strings.HasPrefix(out, "servin version ") {
		t.Fatalf("the version is %q", out)
	}
	if out := p.must("--help"); !strings.Contains(out, "Common commands:") || !strings.Contains(out, "run ") {
		t.Fatalf("the help is %q", out)
	}
	if out := p.must("help", "run"); !strings.Contains(out, "--publish") {
		t.Fatalf("the help of run is %q", out)
	}
	if out := p.must("mode", "status"); !strings.Contains(out, "vm (auto)") {
		t.Fatalf("the mode is %q", out)
	}
	if out, err := p.servin("nonsense"); err == nil || !strings.Contains(out, "nonsense") {
		t.Fatalf("a command that there is not: %q, %v", out, err)
	}
	if out, err := p.servin("--host", "tcp://127.0.0.1:1", "ps"); err == nil || !strings.Contains(out, "cannot reach the engine at tcp://127.0.0.1:1") {
		t.Fatalf("where no engine is: %q, %v", out, err)
	}

	e := engine(t)
	p.must("context", "create", "plain", "--host", "tcp://"+e.plain)
	p.must("context", "use", "plain")
	if out := p.must("context", "ls"); !strings.Contains(out, "plain *") {
		t.Fatalf("the contexts are %q", out)
	}
	kept, err := filepath.Glob(filepath.Join(p.dir, "w", "drive_c", "users", "*", "AppData", "Roaming", "servin", "config.json"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("the settings are in %v (%v)", kept, err)
	}
	if out := p.must("version"); !strings.Contains(out, "windows/amd64") || !strings.Contains(out, "linux/") {
		t.Fatalf("the versions are %q", out)
	}
	if out := p.must("run", "--rm", "--network", "none", "servin/hello", "echo", "from", "windows"); strings.TrimSpace(out) != "from windows" {
		t.Fatalf("a container says %q", out)
	}
	if out, err := p.servin("run", "--rm", "--network", "none", "servin/hello", "exit", "7"); exitCode(err) != 7 {
		t.Fatalf("a container's status: %v\n%s", err, out)
	}
	// Files go over with their names as they are here.
	file := filepath.Join(p.dir, "f")
	if err := os.WriteFile(file, []byte("of this machine\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	p.must("create", "--name", "box", "--network", "none", "servin/hello")
	p.must("cp", path(file), "box:/f")
	p.must("cp", "box:/f", path(file)+"2")
	if b, err := os.ReadFile(file + "2"); err != nil || string(b) != "of this machine\n" {
		t.Fatalf("it came back as %q (%v)", b, err)
	}
	if out := p.must("ps", "-a", "--format", "{{.Names}} {{.Image}}"); strings.TrimSpace(out) != "box servin/hello" {
		t.Fatalf("the containers are %q", out)
	}
	p.must("rm", "box")

	tls := []string{"--host", "tcp://" + e.secure, "--tlsverify", "--tlscacert", path(e.file("ca.pem")), "--tlscert", path(e.file("client.pem")), "--tlskey", path(e.file("client.key"))}
	if out := p.must(append(tls, "run", "--rm", "--network", "none", "servin/hello", "echo", "sealed")...); strings.TrimSpace(out) != "sealed" {
		t.Fatalf("over TLS a container says %q", out)
	}
	if out, err := p.servin("--host", "tcp://"+e.secure, "--tlsverify", "--tlscacert", path(e.file("ca.pem")), "ps"); err == nil {
		t.Fatalf("without a certificate: %q", out)
	}

	if out, err := p.cloudos("version"); err != nil || !strings.HasPrefix(out, "cloudos ") {
		t.Fatalf("the version is %q, %v", out, err)
	}
	if out, err := p.cloudos("help"); err != nil || !strings.Contains(out, "upgrade ") {
		t.Fatalf("the help is %q, %v", out, err)
	}
	// It reaches the engine by servin's context, and by flags; this one is not a CloudOS machine's.
	const none = "does not run on a CloudOS machine"
	if out, err := p.cloudos("status"); err == nil || !strings.Contains(out, none) {
		t.Fatalf("the status of the context's machine: %q, %v", out, err)
	}
	if out, err := p.cloudos(append([]string{"config"}, tls...)...); err == nil || !strings.Contains(out, none) {
		t.Fatalf("over TLS: %q, %v", out, err)
	}
	if out, err := p.cloudos("upgrade", path(filepath.Join(p.dir, "missing.release"))); err == nil || !strings.Contains(out, "cannot read the release") {
		t.Fatalf("a release that is not there: %q, %v", out, err)
	}
}

func exitCode(err error) int {
	if ee, ok := err.(*exec.ExitError); ok {
		return ee.ExitCode()
	}
	return -1
}

// server is an engine of this machine's, on two ports of loopback.
type server struct {
	dir, plain, secure string
}

func (s *server) file(name string) string { return filepath.Join(s.dir, name) }

func engine(t *testing.T) *server {
	t.Helper()
	bin := os.Getenv("SERVIN_BIN")
	if bin == "" {
		bin, _ = filepath.Abs("../../bin")
	}
	if os.Getuid() != 0 {
		t.Skip("SKIP: the engine needs root here")
	}
	dir, err := os.MkdirTemp("", "we")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{dir: dir, plain: free(t), secure: free(t)}
	certificates(t, dir)
	conf := fmt.Sprintf("version: 1\nshutdownTimeout: 1s\ninsecureTCP: true\ntls: {cert: %s, key: %s, ca: %s}\n", s.file("server.pem"), s.file("server.key"), s.file("ca.pem"))
	if err := os.WriteFile(s.file("config.yaml"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(s.file("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	engines := map[string]*exec.Cmd{}
	// One with TLS and one without: an engine has either.
	for name, address := range map[string]string{"plain": s.plain, "secure": s.secure} {
		args := []string{"--root", s.file(name), "--run-root", s.file(name + "-run"), "--listen", "tcp://" + address, "--listen", "unix://" + s.file(name+".sock")}
		file := s.file("config.yaml")
		if name == "plain" {
			file = s.file("plain.yaml")
			if err := os.WriteFile(file, []byte("version: 1\nshutdownTimeout: 1s\ninsecureTCP: true\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command(filepath.Join(bin, "servind"), append([]string{"--config", file}, args...)...)
		cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			t.Fatalf("%v (make build)", err)
		}
		engines[name] = cmd
	}
	t.Cleanup(func() {
		for name, cmd := range engines {
			end := exec.Command(filepath.Join(bin, "servin"), "--host", "unix://"+s.file(name+".sock"), "system", "shutdown", "--force")
			if out, err := end.CombinedOutput(); err != nil {
				t.Errorf("shutdown: %v\n%s", err, out)
				cmd.Process.Kill()
			}
			cmd.Wait()
		}
		if b, err := os.ReadFile(s.file("log")); err == nil && t.Failed() {
			t.Logf("the engines said:\n%s", b)
		}
		os.RemoveAll(dir)
	})
	for _, address := range []string{s.plain, s.secure} {
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if c, err := net.Dial("tcp", address); err == nil {
				c.Close()
				break
			} else if time.Now().After(end) {
				t.Fatal(err)
			}
		}
	}
	return s
}

// free is a port that nobody listens on.
func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// certificates makes an authority, and of it a server's and a client's certificate.
func certificates(t *testing.T, dir string) {
	t.Helper()
	now := time.Now()
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			BasicConstraintsValid: true, IsCA: i == 0, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
		if i == 0 {
			ca, caKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for file, block := range map[string]*pem.Block{".pem": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: raw}} {
			if err := os.WriteFile(filepath.Join(dir, name+file), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// forwarder is a library for Windows on amd64 with one function, which is another
// library's (Microsoft's PE format, .edata section).
func forwarder(name, function, to string) []byte {
	const at, align = 0x1000, 0x200
	var f, section bytes.Buffer
	put := func(b *bytes.Buffer, values ...any) {
		for _, v := range values {
			binary.Write(b, binary.LittleEndian, v)
		}
	}
	const names = at + 40 + 3*4
	put(&section, []uint32{0, 0, 0, names, 1, 1, 1, at + 40, at + 44, at + 48})                        // the directory
	put(&section, []uint32{names + uint32(len(name)+len(function)+2), names + uint32(len(name)+1), 0}) // addresses, names, ordinals
	section.WriteString(name + "\x00" + function + "\x00" + to + "\x00")
	size := uint32(section.Len())

	f.WriteString("MZ")
	put(&f, make([]byte, 58), uint32(64))
	f.WriteString("PE\x00\x00")
	put(&f, []uint16{0x8664, 1}, []uint32{0, 0, 0}, []uint16{240, 0x2022})
	put(&f, uint16(0x20b), uint16(0), []uint32{0, align, 0, 0, at}, uint64(0x1f0000000), []uint32{0x1000, align},
		[]uint16{6, 0, 0, 0, 6, 0}, []uint32{0, at + 0x1000, align, 0}, []uint16{3, 0x100}, []uint64{1 << 20, 1 << 12, 1 << 20, 1 << 12}, []uint32{0, 16})
	put(&f, []uint32{at, size}, make([]byte, 15*8))
	put(&f, [8]byte{'.', 'e', 'd', 'a', 't', 'a'}, []uint32{size, at, align, align, 0, 0, 0, 0x40000040})
	put(&f, make([]byte, align-f.Len()), section.Bytes(), make([]byte, align-section.Len()))
	return f.Bytes()
}
