package bridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// request is a series of rtnetlink messages that go to the kernel in one
// system call. The kernel carries them out in order; each is acknowledged by
// itself, so one that fails does not stop those behind it.
type request struct {
	b     []byte
	start int
	what  []string
	// tolerate holds, per message, an errno that is no failure, 0 for none.
	tolerate []unix.Errno
}

func (r *request) begin(what string, typ uint16, flags uint16) {
	r.what = append(r.what, what)
	r.tolerate = append(r.tolerate, 0)
	r.start = len(r.b)
	r.b = append(r.b, 0, 0, 0, 0)
	r.b = binary.NativeEndian.AppendUint16(r.b, typ)
	r.b = binary.NativeEndian.AppendUint16(r.b, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	r.b = append(r.b, 0, 0, 0, 0, 0, 0, 0, 0) // seq and port, filled in by do
}

func (r *request) end() {
	binary.NativeEndian.PutUint32(r.b[r.start:], uint32(len(r.b)-r.start))
}

// anyErrno in tolerate marks a message whose failure does not matter.
const anyErrno = unix.Errno(0xffff)

func (r *request) allow(e unix.Errno) { r.tolerate[len(r.tolerate)-1] = e }

func (r *request) ifinfo(index int, flags, change uint32) {
	r.b = append(r.b, unix.AF_UNSPEC, 0, 0, 0)
	r.b = binary.NativeEndian.AppendUint32(r.b, uint32(index))
	r.b = binary.NativeEndian.AppendUint32(r.b, flags)
	r.b = binary.NativeEndian.AppendUint32(r.b, change)
}

func (r *request) attr(typ uint16, data []byte) {
	r.b = binary.NativeEndian.AppendUint16(r.b, uint16(4+len(data)))
	r.b = binary.NativeEndian.AppendUint16(r.b, typ)
	r.b = append(r.b, data...)
	r.pad()
}

func (r *request) attrString(typ uint16, s string) {
	r.b = binary.NativeEndian.AppendUint16(r.b, uint16(5+len(s)))
	r.b = binary.NativeEndian.AppendUint16(r.b, typ)
	r.b = append(r.b, s...)
	r.b = append(r.b, 0)
	r.pad()
}

func (r *request) attr32(typ uint16, v uint32) {
	r.b = binary.NativeEndian.AppendUint16(r.b, 8)
	r.b = binary.NativeEndian.AppendUint16(r.b, typ)
	r.b = binary.NativeEndian.AppendUint32(r.b, v)
}

func (r *request) attr8(typ uint16, v uint8) { r.attr(typ, []byte{v}) }

func (r *request) nest(typ uint16) int {
	at := len(r.b)
	r.b = append(r.b, 0, 0)
	r.b = binary.NativeEndian.AppendUint16(r.b, typ|unix.NLA_F_NESTED)
	return at
}

func (r *request) endNest(at int) {
	binary.NativeEndian.PutUint16(r.b[at:], uint16(len(r.b)-at))
}

func (r *request) pad() {
	for len(r.b)%4 != 0 {
		r.b = append(r.b, 0)
	}
}

func (r *request) attrAddr(typ uint16, a netip.Addr) {
	if a.Is4() {
		x := a.As4()
		r.attr(typ, x[:])
		return
	}
	x := a.As16()
	r.attr(typ, x[:])
}

// conn is a routing netlink socket, bound to the network namespace that its
// maker's thread was in.
type conn struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

func dial() (*conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot open a netlink socket: %w", err)
	}
	// Acknowledgements need not carry the request back.
	_ = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot bind a netlink socket: %w", err)
	}
	return &conn{fd: fd, buf: make([]byte, 8192)}, nil
}

// dialAt opens a routing socket in another network namespace.
func dialAt(ns *os.File) (c *conn, err error) {
	err = Inside(ns, func() error {
		c, err = dial()
		return err
	})
	return c, err
}

func (c *conn) close() { unix.Close(c.fd) }

// do sends the messages and returns the first failure among them.
func (c *conn) do(r *request) error { return c.exchange(r, nil) }

// exchange is do for messages that ask: see gets what the kernel answers besides.
func (c *conn) exchange(r *request, see func(typ uint16, body []byte)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	first := c.seq + 1
	for at := 0; at < len(r.b); {
		c.seq++
		binary.NativeEndian.PutUint32(r.b[at+8:], c.seq)
		at += int(binary.NativeEndian.Uint32(r.b[at:]))
	}
	if err := unix.Sendto(c.fd, r.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("cannot send to netlink: %w", err)
	}
	var failed error
	for left := len(r.what); left > 0; {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot receive from netlink: %w", err)
		}
		for b := c.buf[:n]; len(b) >= unix.SizeofNlMsghdr; {
			size := int(binary.NativeEndian.Uint32(b))
			if size < unix.SizeofNlMsghdr || size > len(b) {
				break
			}
			typ, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			if typ == unix.NLMSG_ERROR && size >= unix.SizeofNlMsghdr+4 && seq-first < uint32(len(r.what)) {
				left--
				i := seq - first
				no := unix.Errno(-int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])))
				if no != 0 && no != r.tolerate[i] && r.tolerate[i] != anyErrno && failed == nil {
					failed = fmt.Errorf("cannot %s: %w", r.what[i], no)
				}
			} else if see != nil && seq-first < uint32(len(r.what)) {
				see(typ, b[unix.SizeofNlMsghdr:size])
			}
			b = b[min(len(b), (size+3)&^3):]
		}
	}
	return failed
}

// index finds a link by name in the socket's namespace.
func (c *conn) index(name string) (int, error) {
	r, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("cannot use %q as a link's name: %w", name, err)
	}
	if err := unix.IoctlIfreq(c.fd, unix.SIOCGIFINDEX, r); err != nil {
		return 0, fmt.Errorf("cannot find link %s: %w", name, err)
	}
	return int(r.Uint32()), nil
}

// Inside runs fn on a thread that is in the namespace ns. Sockets that fn
// opens stay in that namespace.
func Inside(ns *os.File, fn func() error) error {
	runtime.LockOSThread()
	// The thread's own namespace, not the process's: under test the two may
	// differ.
	self, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cannot open the thread's network namespace: %w", err)
	}
	defer unix.Close(self)
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cannot enter the network namespace: %w", err)
	}
	ferr := fn()
	if err := unix.Setns(self, unix.CLONE_NEWNET); err != nil {
		// The thread stays locked and so dies with this goroutine; the caller
		// must not go on in the wrong namespace.
		panic(fmt.Sprintf("cannot return to the engine's network namespace: %v", err))
	}
	runtime.UnlockOSThread()
	return ferr
}

// Socket opens a non-blocking tcp socket of to's family in ns.
func Socket(ns *os.File, to netip.AddrPort) (f *os.File, err error) {
	fam := unix.AF_INET
	if to.Addr().Is6() {
		fam = unix.AF_INET6
	}
	err = Inside(ns, func() error {
		fd, err := unix.Socket(fam, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("cannot open a socket: %w", err)
		}
		f = os.NewFile(uintptr(fd), "socket")
		return nil
	})
	return f, err
}

// StartConnect begins to connect a socket and does not wait.
func StartConnect(f *os.File, to netip.AddrPort) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		sa = &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	var cerr error
	if err := raw.Control(func(fd uintptr) { cerr = unix.Connect(int(fd), sa) }); err != nil {
		return err
	}
	if cerr != nil && !errors.Is(cerr, unix.EINPROGRESS) {
		return fmt.Errorf("cannot connect to %s: %w", to, cerr)
	}
	return nil
}
