package uplink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// heed takes what routers announce of name servers until ctx is done. It begins before links come up, so that the
// answers to what the kernel then asks are heard.
func (n *Net) heed(ctx context.Context, opened chan<- struct{}) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err == nil {
		if err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1<<(unix.RTNLGRP_ND_USEROPT-1) | 1<<(unix.RTNLGRP_IPV6_PREFIX-1)}); err != nil {
			unix.Close(fd)
		}
	}
	close(opened)
	if err != nil {
		return fmt.Errorf("cannot hear what routers announce: %w", err)
	}
	f := os.NewFile(uintptr(fd), "routers")
	defer f.Close()
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	b := make([]byte, 16<<10) // an option has 2040 bytes at most
	if err := n.askFor(); err != nil {
		n.log("%v", err)
	}
	var asked time.Time
	waiting := false // until it may be asked again
	for ctx.Err() == nil {
		until := n.nextEnd()
		if next := asked.Add(time.Second); waiting && (until.IsZero() || next.Before(until)) {
			until = next
		}
		messages, err := hear(f, b, until)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("cannot hear what routers announce: %w", err)
		}
		// An advertisement has an option or a prefix in nearly every network; what it says besides is asked for.
		waiting = waiting || len(messages) > 0
		if waiting && time.Since(asked) >= time.Second {
			if err := n.askFor(); err != nil {
				n.log("%v", err)
			}
			asked, waiting = time.Now(), false
		}
		if !n.announced(messages, time.Now()) {
			continue
		}
		if err := n.writeResolv(); err != nil {
			n.log("%v", err)
		}
		n.changed()
		// Who announces something else all the time is heard once a second; what comes in between may be lost, as on the link.
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// hear waits for a message of the kernel, no longer than until a time (zero is for ever).
func hear(f *os.File, b []byte, until time.Time) ([]byte, error) {
	if err := f.SetReadDeadline(until); err != nil {
		return nil, err
	}
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var size int
	var from unix.Sockaddr
	var rerr error
	if err := c.Read(func(fd uintptr) bool {
		size, from, rerr = unix.Recvfrom(int(fd), b, 0)
		return rerr != unix.EAGAIN
	}); err != nil {
		return nil, err
	}
	if rerr == unix.ENOBUFS || rerr == unix.EINTR {
		return nil, nil // a burst; routers repeat themselves
	}
	if a, ok := from.(*unix.SockaddrNetlink); rerr != nil || !ok || a.Pid != 0 {
		return nil, rerr
	}
	return b[:size], nil
}

// announced takes the kernel's messages, and drops what is over; it says whether anything changed.
func (n *Net) announced(b []byte, now time.Time) (changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.links {
		changed = l.routers.expire(now) || changed
		changed = l.told.expire(now) || changed
	}
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.RTM_NEWNDUSEROPT {
			if a, ok := parseUserOption(b[unix.SizeofNlMsghdr:size]); ok {
				for _, l := range n.links {
					if l.index == a.link && l.routers.take(a, now) {
						changed = true
					}
				}
			}
		}
		b = b[min((size+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return changed
}

// nextEnd is when the first announcement is over; zero is never.
func (n *Net) nextEnd() (next time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.links {
		for _, end := range append(l.routers.ends(), l.told.ends()...) {
			if next.IsZero() || end.Before(next) {
				next = end
			}
		}
	}
	return next
}

// solicit asks the routers of a link that was up before: they told somebody else, and the kernel asks when a link comes up alone.
func solicit(ifi *net.Interface) error {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = errors.Join(unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255), // others are dropped
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, ifi.Index))
	if err != nil {
		return err
	}
	allRouters := unix.SockaddrInet6{Addr: [16]byte{0: 0xff, 1: 2, 15: 2}, ZoneId: uint32(ifi.Index)}
	return unix.Sendto(fd, []byte{133, 0, 0, 0, 0, 0, 0, 0}, 0, &allRouters) // the kernel sums it up
}
