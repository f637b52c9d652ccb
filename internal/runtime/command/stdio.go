package command

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// stdio are the ends of the standard streams: inside for the command, outside
// for the monitor; -1 none.
type stdio struct {
	inside, outside [3]int
	own             []int
}

func newStdio(o contract.Stdio, uid uint32, m []specs.LinuxIDMapping) (*stdio, error) {
	s := &stdio{outside: [3]int{-1, -1, -1}}
	for i := range 3 {
		if o.Terminal || i == 0 && !o.Stdin {
			fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				s.close()
				return nil, fault.New(fault.Internal, "cannot open /dev/null: %w", err)
			}
			s.inside[i], s.own = fd, append(s.own, fd)
			continue
		}
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
			s.close()
			return nil, fault.New(fault.Exhausted, "cannot make a pipe: %w", err)
		}
		s.own = append(s.own, p[0], p[1])
		if i == 0 {
			s.inside[i], s.outside[i] = p[0], p[1]
		} else {
			s.inside[i], s.outside[i] = p[1], p[0]
		}
		if id := hostID(uid, m); id > 0 {
			_ = unix.Fchown(s.inside[i], id, -1)
		}
	}
	return s, nil
}

func hostID(id uint32, m []specs.LinuxIDMapping) int {
	for _, l := range m {
		if id >= l.ContainerID && id-l.ContainerID < l.Size {
			return int(l.HostID + (id - l.ContainerID))
		}
	}
	if len(m) > 0 {
		return -1
	}
	return int(id)
}

func (s *stdio) close() {
	for _, fd := range s.own {
		unix.Close(fd)
	}
	s.own = nil
}

// console receives the master of a terminal that the runtime made.
type console struct {
	l    *net.UnixListener
	path string
	dir  string
}

// listenConsole listens on a short path: socket names are limited to 107 bytes.
func listenConsole(string) (*console, error) {
	dir, err := os.MkdirTemp("", "servin-pty-")
	if err != nil {
		return nil, fault.New(fault.Internal, "cannot make a console socket: %w", err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		os.RemoveAll(dir)
		return nil, fault.New(fault.Internal, "cannot make a console socket: %w", err)
	}
	return &console{l: l, path: path, dir: dir}, nil
}

func (c *console) close() {
	c.l.Close()
	os.RemoveAll(c.dir)
}

// accept waits for the master, until ctx or the monitor ends.
func (c *console) accept(ctx context.Context, gone <-chan struct{}) (int, error) {
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-ctx.Done():
		case <-gone:
		case <-stop:
			return
		}
		_ = c.l.SetDeadline(time.Unix(1, 0))
	}()
	conn, err := c.l.AcceptUnix()
	if err != nil {
		return -1, errors.Join(context.Cause(ctx), err)
	}
	defer conn.Close()
	if d, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(d)
	} else {
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, errors.Join(errors.New("the runtime sent no terminal"), err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.Join(errors.New("the runtime sent no terminal"), err)
	}
	unix.CloseOnExec(fds[0])
	return fds[0], nil
}
