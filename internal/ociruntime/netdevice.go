package ociruntime

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// moveDevices moves network devices of the host into the container's network
// namespace, with their permanent global addresses, which the kernel takes from a
// device that moves (runtime spec, config-linux, network devices).
func (b *birth) moveDevices() error {
	devices := b.spec.Linux.NetDevices
	if len(devices) == 0 {
		return nil
	}
	if unprivileged() || b.rec.Config.RootlessCgroups {
		return fmt.Errorf("network devices are not supported for rootless containers")
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", b.proc.pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	for _, name := range slices.Sorted(maps.Keys(devices)) {
		to := devices[name].Name
		if to == "" {
			to = name
		}
		for _, n := range []string{name, to} {
			if n == "" || len(n) >= unix.IFNAMSIZ || n == "." || n == ".." || strings.ContainsAny(n, "/: ") {
				return fmt.Errorf("invalid network device name %q", n)
			}
		}
		if err := moveDevice(name, to, int(ns.Fd())); err != nil {
			return fmt.Errorf("cannot move network device %s: %w", name, err)
		}
	}
	return nil
}

func moveDevice(name, to string, ns int) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return err
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	// Name and namespace in one step, so that neither side sees a wrong name.
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(link.Attrs().Index)
	req.AddData(msg)
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(to)))
	req.AddData(nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(ns))))
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return err
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	moved, err := h.LinkByName(to)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if a.Flags&unix.IFA_F_PERMANENT == 0 || a.Scope != unix.RT_SCOPE_UNIVERSE {
			continue
		}
		if err := h.AddrAdd(moved, &netlink.Addr{IPNet: a.IPNet}); err != nil {
			return fmt.Errorf("address %s: %w", a.IPNet, err)
		}
	}
	return h.LinkSetUp(moved)
}
