package server

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestHanded hands a connection over as the engine does: what it read already comes
// first, then what the client sends, and its end is told.
func TestHanded(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = c.(*net.UnixConn)
		defer ends[i].Close()
	}
	engine, l := ends[0], &Handed{ends[1]}

	// Messages with too few descriptors are passed over, and leak none.
	before := descriptors(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := engine.Write([]byte("none")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := engine.WriteMsgUnix([]byte("one"), unix.UnixRights(int(w.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()

	sock, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	client, err := net.Dial("unix", sock.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	accepted, err := sock.Accept()
	if err != nil {
		t.Fatal(err)
	}
	done, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer done.Close()
	cf, err := accepted.(*net.UnixConn).File()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := engine.WriteMsgUnix([]byte("read before, "), unix.UnixRights(int(cf.Fd()), int(theirs.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	for _, c := range []io.Closer{theirs, cf, accepted} {
		_ = c.Close()
	}

	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); err != nil { // the one descriptor was closed
		t.Fatal(err)
	}
	_ = r.Close()
	if _, err := client.Write([]byte("sent after")); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len("read before, sent after"))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != "read before, sent after" {
		t.Fatalf("%q %v", got, err)
	}
	if _, err := conn.Write([]byte("answer")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(client, got[:6]); err != nil || string(got[:6]) != "answer" {
		t.Fatalf("%q %v", got[:6], err)
	}
	_ = done.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := done.Read(got); !os.IsTimeout(err) {
		t.Fatalf("the end was told too early: %v", err)
	}
	_ = done.SetReadDeadline(time.Time{})
	_ = conn.Close()
	if _, err := done.Read(got); err != io.EOF {
		t.Fatalf("the end was not told: %v", err)
	}
	if _, err := client.Read(got); err != io.EOF {
		t.Fatalf("the client's connection stays: %v", err)
	}
	_ = done.Close()
	_ = client.Close()
	_ = sock.Close()
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors, %d before", after, before)
	}

	_ = engine.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("there is another connection after the engine's end")
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}
