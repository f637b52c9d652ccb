//go:build linux

package durable_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/durable"
)

func names(t *testing.T, dir string) string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		out = append(out, e.Name())
	}
	return strings.Join(out, " ")
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestModeAndOwner(t *testing.T) {
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	for _, mode := range []fs.FileMode{0o600, 0o644, 0o444, 0o755} {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte("a longer one that was there"), 0o640); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, 12, 34); err != nil && os.Geteuid() == 0 {
			t.Fatal(err)
		}
		if err := durable.WriteFile(path, []byte("new"), mode, durable.Everything); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		sys := st.Sys().(*syscall.Stat_t)
		if st.Mode() != mode || int(sys.Uid) != os.Geteuid() || int(sys.Gid) != os.Getegid() || content(t, path) != "new" {
			t.Errorf("%v: %v, owner %d:%d, %q", mode, st.Mode(), sys.Uid, sys.Gid, content(t, path))
		}
	}
}

func TestWhole(t *testing.T) {
	const size = 1 << 20
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, bytes.Repeat([]byte("0"), size), 0o600); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var readers, writers sync.WaitGroup
	readers.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			b, err := os.ReadFile(path)
			if err != nil || len(b) != size || bytes.Count(b, b[:1]) != size {
				t.Errorf("read %d bytes of more than one writer, or not all (%v)", len(b), err)
				return
			}
		}
	})
	for _, c := range []string{"1", "2", "3"} {
		writers.Go(func() {
			for range 40 {
				if err := durable.WriteFile(path, bytes.Repeat([]byte(c), size), 0o600, durable.Nothing); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(stop)
	readers.Wait()
	if got := names(t, dir); got != "f" {
		t.Errorf("the directory has %s", got)
	}
}

// A second who replaces the file waits for the first.
func TestOneAfterTheOther(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	inside, second := make(chan struct{}), make(chan error, 1)
	go func() {
		<-inside
		second <- durable.Replace(path, 0o600, durable.Nothing, func(f *os.File) error {
			b, err := os.ReadFile(path)
			f.Write(append(b, '2'))
			return err
		})
	}()
	err := durable.Replace(path, 0o600, durable.Nothing, func(f *os.File) error {
		st, err := f.Stat()
		if err != nil {
			return err
		}
		waiting := fmt.Sprintf(":%d 0 EOF", st.Sys().(*syscall.Stat_t).Ino)
		close(inside)
		for waits := false; !waits; {
			select {
			case err := <-second:
				second <- nil
				return fmt.Errorf("the second did not wait: %v", err)
			case <-time.After(time.Millisecond):
			}
			for l := range strings.Lines(content(t, "/proc/locks")) {
				waits = waits || strings.Contains(l, "-> FLOCK") && strings.Contains(l, waiting)
			}
		}
		_, err = f.Write([]byte("1"))
		return err
	})
	if err := errors.Join(err, <-second); err != nil || content(t, path) != "12" || names(t, dir) != "f" {
		t.Errorf("%v, %q, %s", err, content(t, path), names(t, dir))
	}
}

func TestFailures(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	cause := errors.New("no")
	err := durable.Replace(path, 0o600, durable.Nothing, func(f *os.File) error {
		f.Write([]byte("half"))
		return cause
	})
	if !errors.Is(err, cause) || names(t, dir) != "f" || content(t, path) != "old" {
		t.Errorf("%v, %s, %q", err, names(t, dir), content(t, path))
	}
	func() {
		defer func() { _ = recover() }()
		_ = durable.Replace(path, 0o600, durable.Nothing, func(*os.File) error { panic("no") })
	}()
	if names(t, dir) != "f" {
		t.Errorf("after a panic: %s", names(t, dir))
	}
	if err := durable.WriteFile(path, nil, 0o600, 0); err == nil || content(t, path) != "old" {
		t.Error("it was not said what to sync")
	}
	if err := os.MkdirAll(filepath.Join(dir, "d", "e"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(filepath.Join(dir, "d"), nil, 0o600, durable.Content); err == nil || names(t, dir) != "d f" {
		t.Errorf("over a directory: %v, %s", err, names(t, dir))
	}
	if err := durable.WriteFile(filepath.Join(dir, "none", "f"), nil, 0o600, durable.Content); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in no directory: %v", err)
	}
}

// Killed ones leave one file at most, and the next writer removes it.
func TestKilled(t *testing.T) {
	if path := os.Getenv("DURABLE_TEST_PATH"); path != "" {
		_ = durable.Replace(path, 0o600, durable.Nothing, func(f *os.File) error {
			f.Write([]byte("half"))
			os.Stdout.WriteString("in\n")
			select {}
		})
		return
	}
	dir := t.TempDir()
	path := filepath.Join(dir, strings.Repeat("long", 63)) // with a suffix it does not fit
	for range 3 {
		cmd := exec.Command(os.Args[0], "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), "DURABLE_TEST_PATH="+path)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		var b [3]byte
		if _, err := out.Read(b[:]); err != nil || string(b[:]) != "in\n" {
			t.Fatalf("%q, %v", b, err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		left := names(t, dir)
		if !durable.IsTemporary(left) || strings.Contains(left, " ") {
			t.Fatalf("the killed left %s", left)
		}
	}
	if err := durable.WriteFile(path, []byte("whole"), 0o600, durable.Nothing); err != nil {
		t.Fatal(err)
	}
	if names(t, dir) != filepath.Base(path) || content(t, path) != "whole" {
		t.Errorf("%s, %q", names(t, dir), content(t, path))
	}
}

// What somebody else has put under the temporary file's name is not written to, waited for
// or followed.
func TestForeignTemporary(t *testing.T) {
	for name, put := range map[string]func(at, victim string) error{
		"link":      func(at, victim string) error { return os.Symlink(victim, at) },
		"hard link": func(at, victim string) error { return os.Link(victim, at) },
		"pipe":      func(at, _ string) error { return syscall.Mkfifo(at, 0o666) },
		"directory": func(at, _ string) error { return os.Mkdir(at, 0o700) },
		"not ours": func(at, _ string) error {
			return errors.Join(os.WriteFile(at, nil, 0o666), os.Chown(at, 1234, 1234))
		},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "not ours" && os.Geteuid() != 0 {
				t.Skip("SKIP: giving a file away needs root")
			}
			dir := t.TempDir()
			path, victim := filepath.Join(dir, "f"), filepath.Join(dir, "victim")
			if err := os.WriteFile(victim, []byte("kept"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := put(filepath.Join(dir, ".f.new"), victim); err != nil {
				t.Fatal(err)
			}
			if err := durable.WriteFile(path, []byte("new"), 0o600, durable.Content); err != nil {
				t.Fatal(err)
			}
			if content(t, path) != "new" || content(t, victim) != "kept" {
				t.Errorf("%q, %q", content(t, path), content(t, victim))
			}
			if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() {
				t.Errorf("%v, %v", st, err)
			}
		})
	}
}
