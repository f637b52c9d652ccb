package ociruntime

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// notifySocket gives a container a socket for sd_notify(3) of its own and passes on
// that it is ready: the caller's socket names a place on the host.
type notifySocket struct {
	host string
	path string
	conn *net.UnixConn
}

func (a *app) newNotify(dir, host string) *notifySocket {
	if host == "" {
		return nil
	}
	return &notifySocket{host: host, path: filepath.Join(dir, "notify", "notify.sock")}
}

func (n *notifySocket) mount(spec *specs.Spec) {
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: "/run/notify", Type: "bind", Source: filepath.Dir(n.path),
		Options: []string{"bind", "nosuid", "noexec", "nodev", "ro"}})
	spec.Process.Env = append(spec.Process.Env, "NOTIFY_SOCKET=/run/notify/notify.sock")
}

// prepare makes the directory, and with bind the socket, which for a created
// container is made at its start.
func (n *notifySocket) prepare(bind bool) error {
	if err := os.Mkdir(filepath.Dir(n.path), 0o755); err != nil {
		return err
	}
	if bind {
		return n.bind()
	}
	return nil
}

func (n *notifySocket) bind() error {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: n.path, Net: "unixgram"})
	if err != nil {
		return err
	}
	if err := os.Chmod(n.path, 0o777); err != nil {
		c.Close()
		return err
	}
	n.conn = c
	return nil
}

// relay waits until the container says that it is ready, or has ended, and tells
// the host so, with the container's init as the main process.
func (n *notifySocket) relay(pid int) error {
	if n.conn == nil {
		return nil
	}
	defer n.conn.Close()
	client, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.host, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer client.Close()
	buf := make([]byte, 4096)
	for {
		if err := n.conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
			return err
		}
		got, err := n.conn.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			if !processAlive(pid, 0) {
				return nil
			}
			continue
		}
		if err != nil {
			return err
		}
		for line := range bytes.SplitSeq(buf[:got], []byte{'\n'}) {
			if !bytes.HasPrefix(line, []byte("READY=")) {
				continue
			}
			if _, err := fmt.Fprintf(client, "%s\n", line); err != nil {
				return err
			}
			if _, err := fmt.Fprintf(client, "MAINPID=%d\n", pid); err != nil {
				return err
			}
			return barrier(client)
		}
	}
}

// barrier waits until what was sent has been read (sd_notify_barrier(3)).
func barrier(c *net.UnixConn) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	_, _, err = c.WriteMsgUnix([]byte("BARRIER=1"), unix.UnixRights(int(w.Fd())), nil)
	w.Close()
	if err != nil {
		return err
	}
	if err := r.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return nil //nolint:nilerr // nothing to wait with
	}
	_, _ = r.Read(make([]byte, 1))
	return nil
}
