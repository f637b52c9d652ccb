// Package shim speaks to servin-shim, the static C program that monitors one
// container and holds the start-up stage (see shim/PROTOCOL.md). It embeds the
// program, runs it from a sealed memory file, and encodes and decodes the
// messages of its control sockets.
//
// Vocabulary. A *monitor* is one running servin-shim. A *cookie* names a
// request; its answer, and for an exec every later notice, carries it. Package
// runtime/native and package runtime/command import this package.
package shim

import (
	"embed"
	"errors"
	"io/fs"
	"os"
	"runtime"

	"github.com/cloudos-io/cloudos/internal/fault"
	"golang.org/x/sys/unix"
)

//go:embed bin
var programs embed.FS

// EnvPath names a file to use instead of the embedded program.
const EnvPath = "SERVIN_SHIM"

func program() ([]byte, error) {
	if p := os.Getenv(EnvPath); p != "" {
		return os.ReadFile(p)
	}
	b, err := programs.ReadFile("bin/servin-shim-" + runtime.GOARCH)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.New(fault.Unavailable, "cannot find servin-shim for %s in this build: run `make -C shim` and build again, or set %s", runtime.GOARCH, EnvPath)
	}
	return b, err
}

// Executable is the program in a memory file that can no longer be written to,
// so that nothing inside a container can change it through /proc/self/exe.
type Executable struct {
	f    *os.File
	null *os.File
	path string
}

// NewExecutable makes one.
func NewExecutable() (*Executable, error) {
	f, err := Open()
	if err != nil {
		return nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Executable{f: f, null: null, path: procFD(int(f.Fd()))}, nil
}

// Open gives the program in a sealed memory file of its own.
func Open() (*os.File, error) {
	b, err := program()
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("servin-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("servin-shim", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	// Far above the few descriptors that a child is given.
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 64)
	unix.Close(fd)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	f := os.NewFile(uintptr(high), "servin-shim")
	if _, err := f.Write(b); err != nil {
		f.Close()
		return nil, err
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		f.Close()
		return nil, os.NewSyscallError("fcntl", err)
	}
	return f, nil
}

// Path is where the program can be executed by this process's children.
func (e *Executable) Path() string { return e.path }

// File is the program's descriptor, for others that run it.
func (e *Executable) File() *os.File { return e.f }

// Close releases the memory file; running monitors keep their own reference.
func (e *Executable) Close() error { return errors.Join(e.f.Close(), e.null.Close()) }
