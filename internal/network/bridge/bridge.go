// Package bridge makes and removes the links of an engine: bridges, veth pairs
// whose inner end is born inside a container's network namespace, and their
// addresses and routes. It talks rtnetlink itself, several messages to a
// system call, because attaching is on the path of every container start.
// Package network imports it.
package bridge

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Links works on the links of the network namespace it was made in.
type Links struct {
	c *conn
}

// New opens the namespace of the calling thread.
func New() (*Links, error) {
	c, err := dial()
	if err != nil {
		return nil, err
	}
	return &Links{c: c}, nil
}

// Close gives the socket back.
func (l *Links) Close() { l.c.close() }

// Index finds a link by name; 0 if there is none.
func (l *Links) Index(name string) int {
	i, err := l.c.index(name)
	if err != nil {
		return 0
	}
	return i
}

// Spec describes a bridge device.
type Spec struct {
	Name  string
	MTU   int
	MAC   net.HardwareAddr
	Addrs []netip.Prefix
}

// Ensure makes the bridge and brings it up with its addresses. An existing
// one is taken over; created tells which.
func (l *Links) Ensure(s Spec) (created bool, err error) {
	r := &request{}
	r.begin("create bridge "+s.Name, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	r.ifinfo(0, 0, 0)
	r.attrString(unix.IFLA_IFNAME, s.Name)
	if len(s.MAC) == 6 {
		// A bridge without an address of its own takes its ports' lowest and
		// so changes it as containers come and go.
		r.attr(unix.IFLA_ADDRESS, s.MAC)
	}
	if s.MTU > 0 {
		r.attr32(unix.IFLA_MTU, uint32(s.MTU))
	}
	n := r.nest(unix.IFLA_LINKINFO)
	r.attr(unix.IFLA_INFO_KIND, []byte("bridge"))
	r.endNest(n)
	r.end()
	switch err := l.c.do(r); {
	case err == nil:
		created = true
	case !errors.Is(err, unix.EEXIST):
		return false, err
	}
	i, err := l.c.index(s.Name)
	if err != nil {
		return created, err
	}
	if !isBridge(s.Name) {
		return false, fmt.Errorf("cannot use link %s as a bridge: it is of another kind", s.Name)
	}
	r = &request{}
	// Its link-local address is ours to make: the kernel's own is of no use
	// for its first second, and without one no neighbour can be asked for.
	r.noAutoAddress(i, "")
	six := false
	for _, a := range s.Addrs {
		r.address(i, a)
		six = six || a.Addr().Is6()
	}
	if six && len(s.MAC) == 6 {
		r.address(i, linkLocal(s.MAC))
	}
	r.begin("bring up bridge "+s.Name, unix.RTM_NEWLINK, 0)
	r.ifinfo(i, unix.IFF_UP, unix.IFF_UP)
	r.end()
	if err := l.c.do(r); err != nil {
		return created, err
	}
	if six {
		l.c.awaitLocal(s.Addrs)
	}
	// What a container says about routes is not for the host.
	_ = SetSysctl("net/ipv6/conf/"+s.Name+"/accept_ra", "0")
	return created, nil
}

// isBridge asks for the driver's name, which needs no dump of all links, and
// no sysfs, whose mount may belong to another network namespace.
func isBridge(name string) bool {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	d, err := unix.IoctlGetEthtoolDrvinfo(fd, name)
	if err != nil {
		return false
	}
	return unix.ByteSliceToString(d.Driver[:]) == "bridge"
}

// Port says how a link is on its bridge.
type Port struct {
	// Isolated ports reach the bridge itself and ports that are not isolated,
	// but no other isolated one.
	Isolated bool
	// Hairpin lets frames leave by the port they came in by.
	Hairpin bool
	// Addrs and MAC of the other end become neighbour entries of the bridge,
	// so that the host can send before the container has joined the multicast
	// groups by which it would be asked for, and never to a former MAC.
	Addrs []netip.Addr
	MAC   net.HardwareAddr
}

// Plug puts a link on a bridge.
func (l *Links) Plug(index, master int, p Port) error {
	r := &request{b: make([]byte, 0, 256)}
	r.begin("put the link on its bridge", unix.RTM_NEWLINK, 0)
	r.ifinfo(index, unix.IFF_UP, unix.IFF_UP)
	r.attr32(unix.IFLA_MASTER, uint32(master))
	r.end()
	if p.Isolated || p.Hairpin {
		r.begin("set up the bridge port", unix.RTM_SETLINK, 0)
		at := len(r.b)
		r.ifinfo(index, 0, 0)
		r.b[at] = unix.AF_BRIDGE
		n := r.nest(unix.IFLA_PROTINFO)
		if p.Isolated {
			r.attr8(33, 1) // IFLA_BRPORT_ISOLATED
		}
		if p.Hairpin {
			r.attr8(4, 1) // IFLA_BRPORT_MODE
		}
		r.endNest(n)
		r.end()
	}
	for _, a := range p.Addrs {
		r.neighbour(master, a, p.MAC)
	}
	return l.c.do(r)
}

func (r *request) neighbour(index int, a netip.Addr, mac net.HardwareAddr) {
	r.begin("add neighbour "+a.String(), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	f := byte(unix.AF_INET)
	if a.Is6() {
		f = unix.AF_INET6
	}
	r.b = append(r.b, f, 0, 0, 0)
	r.b = binary.NativeEndian.AppendUint32(r.b, uint32(index))
	r.b = binary.NativeEndian.AppendUint16(r.b, unix.NUD_STALE)
	r.b = append(r.b, 0, 0)
	r.attrAddr(unix.NDA_DST, a)
	r.attr(unix.NDA_LLADDR, mac)
	r.end()
	r.allow(anyErrno) // a full table only means that the container is asked
}

// Settle makes the kernel take note of a fresh pair's carrier now, instead of
// when its work queue comes to it, so that the first packet is not lost.
func (l *Links) Settle(name string) {
	// Asking for the link state through ethtool synchronises it (Linux 6.8);
	// on older kernels this is a harmless question.
	settle(l.c.fd, name)
}

// Delete removes a link; one that is gone already is fine. The kernel waits
// for every CPU to have let go of it (tens of milliseconds).
func (l *Links) Delete(index int) error {
	r := &request{}
	r.begin("delete a link", unix.RTM_DELLINK, 0)
	r.ifinfo(index, 0, 0)
	r.end()
	r.allow(unix.ENODEV)
	return l.c.do(r)
}

// deleteGroup serialises group deletions, which share one group number.
var deleteGroup sync.Mutex

// DeleteAll removes many links for the price of about one: they are put in a
// group of their own and the group is deleted. Links that went meanwhile are
// fine.
func (l *Links) DeleteAll(indexes []int) error {
	if len(indexes) == 0 {
		return nil
	}
	if len(indexes) == 1 {
		return l.Delete(indexes[0])
	}
	deleteGroup.Lock()
	defer deleteGroup.Unlock()
	// Nobody else groups links under the number of one of the links about to
	// go, with the top bit set.
	group := uint32(1<<31) | uint32(indexes[0])
	r := &request{}
	for _, i := range indexes {
		r.begin("group a link", unix.RTM_NEWLINK, 0)
		r.ifinfo(i, 0, 0)
		r.attr32(unix.IFLA_GROUP, group)
		r.end()
		r.allow(unix.ENODEV)
	}
	r.begin("delete links", unix.RTM_DELLINK, 0)
	r.ifinfo(0, 0, 0)
	r.attr32(unix.IFLA_GROUP, group)
	r.end()
	r.allow(unix.ENODEV)
	return l.c.do(r)
}

// LoopbackUp brings up the loopback link of a namespace.
func LoopbackUp(ns *os.File) error {
	c, err := dialAt(ns)
	if err != nil {
		return err
	}
	defer c.close()
	r := &request{}
	r.begin("bring up loopback", unix.RTM_NEWLINK, 0)
	r.ifinfo(1, unix.IFF_UP, unix.IFF_UP)
	r.end()
	return c.do(r)
}

// Up brings up a link by name.
func (l *Links) Up(name string) error {
	r := &request{}
	r.begin("bring up "+name, unix.RTM_NEWLINK, 0)
	r.ifinfo(0, unix.IFF_UP, unix.IFF_UP)
	r.attrString(unix.IFLA_IFNAME, name)
	r.end()
	return l.c.do(r)
}
