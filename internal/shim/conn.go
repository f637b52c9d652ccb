package shim

import (
	"errors"
	"io"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// conn is a SOCK_SEQPACKET socket that the Go runtime polls.
type conn struct {
	f   *os.File
	raw syscall.RawConn
}

func newConn(fd int) (*conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "shim")
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &conn{f: f, raw: raw}, nil
}

func (c *conn) close() error { return c.f.Close() }

func (c *conn) send(parts [][]byte, fds []int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	var serr error
	err := c.raw.Write(func(fd uintptr) bool {
		for {
			_, serr = unix.SendmsgBuffers(int(fd), parts, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if serr != unix.EINTR {
				return serr != unix.EAGAIN
			}
		}
	})
	if err != nil {
		return err
	}
	return os.NewSyscallError("sendmsg", serr)
}

// recv reads one datagram into buf. Descriptors are close-on-exec. lost says
// that the message is whole but for descriptors that this process has no room
// for; what was sent with them is unusable, the connection is not.
func (c *conn) recv(buf []byte) (n int, fds []int, lost bool, err error) {
	var oob [256]byte // the monitor sends one descriptor at a time, the stage a few
	var oobn, flags int
	var rerr error
	err = c.raw.Read(func(fd uintptr) bool {
		for {
			n, oobn, flags, _, rerr = unix.Recvmsg(int(fd), buf, oob[:], unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
			// A peer that ended with a request of ours unread resets the
			// connection, once: what it sent before can still be read.
			if rerr != unix.EINTR && rerr != unix.ECONNRESET {
				return rerr != unix.EAGAIN
			}
		}
	})
	if err == nil {
		err = rerr
	}
	if err != nil {
		return 0, nil, false, err
	}
	if oobn > 0 {
		cms, perr := unix.ParseSocketControlMessage(oob[:oobn])
		if perr == nil {
			for i := range cms {
				if f, e := unix.ParseUnixRights(&cms[i]); e == nil {
					fds = append(fds, f...)
				}
			}
		}
	}
	if flags&unix.MSG_TRUNC != 0 {
		closeAll(fds)
		return 0, nil, false, errors.New("message is too long")
	}
	if n == 0 {
		closeAll(fds)
		return 0, nil, false, io.EOF
	}
	if lost = flags&unix.MSG_CTRUNC != 0; lost {
		closeAll(fds)
		fds = nil
	}
	return n, fds, lost, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
