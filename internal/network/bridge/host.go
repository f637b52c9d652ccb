package bridge

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// settle asks a link's state through ethtool (ETHTOOL_GLINK).
func settle(fd int, name string) {
	if len(name) >= unix.IFNAMSIZ {
		return
	}
	value := struct{ cmd, data uint32 }{cmd: unix.ETHTOOL_GLINK}
	req := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(req.name[:], name)
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
}

// Named lists links whose names begin with prefix: name to index.
func Named(prefix string) (map[string]int, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("cannot list links: %w", err)
	}
	out := map[string]int{}
	for _, i := range ifs {
		if strings.HasPrefix(i.Name, prefix) {
			out[i.Name] = i.Index
		}
	}
	return out, nil
}

// Busy lists the subnets that this host reaches by its own routes or
// addresses, and that a new network must not overlap. Links whose names are
// in ours are left out.
func Busy(ours map[string]bool) ([]netip.Prefix, error) {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot list routes: %w", err)
	}
	mine := map[int]bool{}
	ifs, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("cannot list links: %w", err)
	}
	var out []netip.Prefix
	for _, i := range ifs {
		if ours[i.Name] {
			mine[i.Index] = true
			continue
		}
		as, err := i.Addrs()
		if err != nil {
			continue // the link went away meanwhile
		}
		for _, a := range as {
			if p, err := netip.ParsePrefix(a.String()); err == nil && !p.Addr().IsLoopback() && !p.Addr().IsLinkLocalUnicast() {
				out = append(out, p.Masked())
			}
		}
	}
	for _, r := range routes {
		if r.Dst == nil || mine[r.LinkIndex] {
			continue
		}
		a, ok := netip.AddrFromSlice(r.Dst.IP)
		ones, bits := r.Dst.Mask.Size()
		if !ok || bits == 0 {
			continue
		}
		a = a.Unmap()
		// Halves and quarters of the whole space are default routes in
		// disguise, as VPNs set them.
		if ones < 4 || ones > a.BitLen() || a.IsLinkLocalUnicast() || a.IsMulticast() || a.IsLoopback() {
			continue
		}
		out = append(out, netip.PrefixFrom(a, ones).Masked())
	}
	return out, nil
}

// UplinkMTU is the MTU of the link that the host's IPv4 default route leaves
// by, at most 1500, and 1500 where there is none.
func UplinkMTU() int {
	mtu := 1500
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil {
		return mtu
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() != "0.0.0.0/0" {
			continue
		}
		if i, err := net.InterfaceByIndex(r.LinkIndex); err == nil && i.MTU >= 576 && i.MTU < mtu {
			mtu = i.MTU
		}
	}
	return mtu
}

// HasIPv6 tells whether the host has a global IPv6 address on a link that is
// not in ours.
func HasIPv6(ours map[string]bool) bool {
	if v, err := Sysctl("net/ipv6/conf/all/disable_ipv6"); err != nil || v != "0" {
		return false
	}
	ifs, err := net.Interfaces()
	if err != nil {
		return false
	}
	for _, i := range ifs {
		if ours[i.Name] || i.Flags&net.FlagLoopback != 0 {
			continue
		}
		as, _ := i.Addrs()
		for _, a := range as {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && !p.Addr().Is4In6() && p.Addr().IsGlobalUnicast() {
				return true
			}
		}
	}
	return false
}

// Sysctl reads a kernel setting; the path is relative to /proc/sys.
func Sysctl(path string) (string, error) {
	b, err := os.ReadFile("/proc/sys/" + path)
	if err != nil {
		return "", fmt.Errorf("cannot read sysctl: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// SetSysctl writes a kernel setting.
func SetSysctl(path, value string) error {
	f, err := os.OpenFile("/proc/sys/"+path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("cannot set sysctl: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("cannot set sysctl: %w", err)
	}
	return nil
}

// Uplink names the link of the host's default route, "" if there is none.
func Uplink() string {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(nil, family)
		if err != nil {
			continue
		}
		best := -1
		name := ""
		for _, r := range routes {
			if r.Dst != nil && !(r.Dst.IP.IsUnspecified() && isDefault(r.Dst)) || best >= 0 && r.Priority >= best {
				continue
			}
			if i, err := net.InterfaceByIndex(r.LinkIndex); err == nil {
				best, name = r.Priority, i.Name
			}
		}
		if name != "" {
			return name
		}
	}
	return ""
}

func isDefault(n *net.IPNet) bool {
	ones, _ := n.Mask.Size()
	return ones == 0
}

// HasLoopback6 tells whether the host has ::1.
func HasLoopback6() bool {
	ifs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	for _, a := range ifs {
		if n, ok := a.(*net.IPNet); ok && n.IP.Equal(net.IPv6loopback) {
			return true
		}
	}
	return false
}
