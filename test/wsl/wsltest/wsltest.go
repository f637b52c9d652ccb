//go:build linux

// Package wsltest is a simulated wsl.exe for tests: a test program becomes it when Main is called first and the
// environment says so. It understands the calls that package wsl makes, answers as wsl.exe does (lists without
// names are failures, errors are on standard output, its text is UTF-16 for who does not ask otherwise), and keeps
// distributions as folders. The programs in a distribution are either simulated, too, or run in
// namespaces as WSL's first process makes them: below another first process, with mounts, a host name and
// System V objects of the distribution's own, and the network of WSL's virtual machine.
package wsltest

import (
	"archive/tar"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// The environment of a simulated wsl.exe.
const (
	envDir      = "SERVIN_WSLTEST_DIR"
	envReal     = "SERVIN_WSLTEST_REAL"
	envTrouble  = "SERVIN_WSLTEST_TROUBLE"
	envInit     = "SERVIN_WSLTEST_INIT"
	envDrives   = "SERVIN_WSLTEST_DRIVES"
	registered  = "rootfs"
	noneRunning = "Es werden keine Verteilungen ausgeführt."
)

// Host is a simulated Windows.
type Host struct {
	// Dir has its distributions.
	Dir string
	// Real runs the programs of distributions in namespaces; it needs root.
	Real bool
	// Drives is the folder that distributions have at /mnt.
	Drives string
	// Trouble is what is wrong with WSL: missing, noimport, old (answers in UTF-16 whatever is asked).
	Trouble string
}

// Env is the environment of its wsl.exe, which is the test program.
func (h Host) Env() []string {
	real := ""
	if h.Real {
		real = "1"
	}
	return []string{envDir + "=" + h.Dir, envReal + "=" + real, envTrouble + "=" + h.Trouble, envDrives + "=" + h.Drives}
}

// Main makes this process wsl.exe where it is to be one; it does not return then.
func Main() {
	if root := os.Getenv(envInit); root != "" {
		distributionInit(root)
	}
	dir := os.Getenv(envDir)
	if dir == "" {
		return
	}
	w := &wsl{Host: Host{Dir: dir, Real: os.Getenv(envReal) != "", Trouble: os.Getenv(envTrouble), Drives: os.Getenv(envDrives)}}
	os.Exit(w.call(os.Args[1:]))
}

type wsl struct{ Host }

// say says a text as wsl.exe does.
func (w *wsl) say(text string) {
	text = strings.ReplaceAll(text, "\n", "\r\n")
	if os.Getenv("WSL_UTF8") == "1" && w.Trouble != "old" {
		fmt.Print(text)
		return
	}
	for _, u := range utf16.Encode([]rune(text)) {
		_ = binary.Write(os.Stdout, binary.LittleEndian, u)
	}
}

func (w *wsl) fail(text string) int {
	w.say(text + "\n")
	return 255 // -1
}

func (w *wsl) call(args []string) int {
	if w.Trouble == "missing" {
		return w.fail("Das Windows-Subsystem für Linux ist nicht installiert. Sie können es durch Ausführen von \"wsl.exe --install\" installieren.")
	}
	switch {
	case slices.Equal(args, []string{"--version"}):
		w.say("WSL-Version: 2.4.13.0\nKernelversion: 5.15.167.4-1\nWSLg-Version: 1.0.65\nWindows-Version: 10.0.26100.3476\n")
		return 0
	case len(args) >= 2 && args[0] == "--list" && args[1] == "--quiet":
		return w.list(len(args) == 3 && args[2] == "--running")
	case len(args) == 6 && args[0] == "--import" && slices.Equal(args[4:], []string{"--version", "2"}):
		return w.importTar(args[1], args[2], args[3])
	case len(args) == 2 && args[0] == "--terminate":
		return w.known(args[1], w.terminate)
	case len(args) == 2 && args[0] == "--unregister":
		return w.known(args[1], w.unregister)
	case len(args) >= 8 && args[0] == "--distribution" && slices.Equal(args[2:7], []string{"--user", "root", "--cd", "/", "--exec"}):
		return w.known(args[1], func(name string) int { return w.exec(name, args[7:]) })
	}
	return w.fail("Ungültige Befehlszeile. Error code: Wsl/E_INVALIDARG: " + strings.Join(args, " "))
}

func (w *wsl) known(name string, do func(string) int) int {
	if _, err := os.Stat(filepath.Join(w.Dir, name, registered)); err != nil {
		return w.fail("Es ist keine Distribution mit dem angegebenen Namen vorhanden.\nFehlercode: Wsl/Service/WSL_E_DISTRO_NOT_FOUND")
	}
	return do(name)
}

func (w *wsl) list(running bool) int {
	all, err := os.ReadDir(w.Dir)
	if err != nil {
		return w.fail(err.Error())
	}
	var out []string
	for _, e := range all {
		if _, err := os.Stat(filepath.Join(w.Dir, e.Name(), registered)); err == nil && (!running || len(w.processes(e.Name())) > 0) {
			out = append(out, e.Name())
		}
	}
	if len(out) == 0 {
		return w.fail(noneRunning)
	}
	w.say(strings.Join(out, "\n") + "\n")
	return 0
}

func (w *wsl) importTar(name, dir, file string) int {
	if w.Trouble == "noimport" {
		return w.fail("WSL2 kann nicht gestartet werden, da die Virtualisierung auf diesem Computer nicht aktiviert ist.\nFehlercode: Wsl/Service/RegisterDistro/CreateVm/HCS/HCS_E_HYPERV_NOT_INSTALLED")
	}
	place := filepath.Join(w.Dir, name)
	if err := os.Mkdir(place, 0o755); err != nil {
		return w.fail("Fehlercode: Wsl/Service/RegisterDistro/ERROR_ALREADY_EXISTS")
	}
	if err := unpackAll(file, filepath.Join(place, "importing")); err != nil {
		os.RemoveAll(place)
		return w.fail(err.Error())
	}
	if err := os.Rename(filepath.Join(place, "importing"), filepath.Join(place, registered)); err != nil {
		return w.fail(err.Error())
	}
	if err := os.WriteFile(filepath.Join(dir, "ext4.vhdx"), nil, 0o600); err != nil {
		return w.fail(err.Error())
	}
	if err := os.WriteFile(filepath.Join(place, "disk"), []byte(filepath.Join(dir, "ext4.vhdx")), 0o600); err != nil {
		return w.fail(err.Error())
	}
	return 0
}

func (w *wsl) unregister(name string) int {
	w.terminate(name)
	disk, err := os.ReadFile(filepath.Join(w.Dir, name, "disk"))
	if err == nil {
		err = os.Remove(string(disk))
	}
	if err == nil {
		err = os.RemoveAll(filepath.Join(w.Dir, name))
	}
	if err != nil {
		return w.fail(err.Error())
	}
	return 0
}

// processes of a distribution that runs: each has a file.
func (w *wsl) processes(name string) []int {
	files, err := os.ReadDir(filepath.Join(w.Dir, name, "processes"))
	if err != nil {
		return nil
	}
	var out []int
	for _, f := range files {
		if pid, err := strconv.Atoi(f.Name()); err == nil && unix.Kill(pid, 0) == nil && !zombie(pid) {
			out = append(out, pid)
		}
	}
	return out
}

func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(b), ") ")
	return err == nil && strings.HasPrefix(rest, "Z")
}

func (w *wsl) enter(name string, pid int) error {
	dir := filepath.Join(w.Dir, name, "processes")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, strconv.Itoa(pid)), nil, 0o600)
}

func (w *wsl) terminate(name string) int {
	for _, pid := range w.processes(name) {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for range 1000 {
		if len(w.processes(name)) == 0 {
			os.RemoveAll(filepath.Join(w.Dir, name, "processes"))
			w.say("Der Vorgang wurde erfolgreich beendet.\n")
			return 0
		}
		time.Sleep(5 * time.Millisecond)
	}
	return w.fail("it does not end")
}

func (w *wsl) exec(name string, args []string) int {
	root := filepath.Join(w.Dir, name, registered)
	if w.Real {
		return w.execReal(name, root, args)
	}
	if err := w.enter(name, os.Getpid()); err != nil {
		return w.fail(err.Error())
	}
	return w.execSimulated(root, args)
}

// unpackAll unpacks a tar as WSL does.
func unpackAll(file, place string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	if err := os.Mkdir(place, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(place)
	if err != nil {
		return err
	}
	defer root.Close()
	for in := tar.NewReader(z); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name, mode := strings.TrimSuffix(h.Name, "/"), fs.FileMode(h.Mode).Perm()
		if h.Mode&0o1000 != 0 {
			mode |= fs.ModeSticky
		}
		switch h.Typeflag {
		case tar.TypeDir:
			if err = root.Mkdir(name, mode.Perm()); err == nil {
				err = root.Chmod(name, mode)
			}
		case tar.TypeSymlink:
			err = root.Symlink(h.Linkname, name)
		case tar.TypeReg:
			var to *os.File
			if to, err = root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode); err == nil {
				_, err = io.Copy(to, in)
				err = errors.Join(err, to.Close())
			}
		default:
			err = fmt.Errorf("a distribution with a %c", h.Typeflag)
		}
		if err != nil {
			return err
		}
	}
}
