package network

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/vishvananda/netlink"
)

// checkParent refuses a macvlan network whose parent link or mode is wrong.
func (m *Manager) checkParent(n *netw) error {
	if _, err := macvlanMode(n.opts.macvlan); err != nil {
		return err
	}
	if n.rec.Parent == "" {
		return fault.New(fault.Invalid, "cannot create network %s: a macvlan network needs -o parent=LINK", n.rec.Name)
	}
	if _, err := net.InterfaceByName(n.rec.Parent); err != nil {
		return fault.New(fault.Invalid, "cannot create network %s: cannot find parent link %s", n.rec.Name, n.rec.Parent)
	}
	return nil
}

func macvlanMode(s string) (netlink.MacvlanMode, error) {
	switch s {
	case "", "bridge":
		return netlink.MACVLAN_MODE_BRIDGE, nil
	case "private":
		return netlink.MACVLAN_MODE_PRIVATE, nil
	case "vepa":
		return netlink.MACVLAN_MODE_VEPA, nil
	case "passthru":
		return netlink.MACVLAN_MODE_PASSTHRU, nil
	}
	return 0, fault.New(fault.Invalid, "cannot use macvlan_mode %q: bridge, private, vepa and passthru are allowed", s)
}

// wireMacvlan makes the container's link directly in its namespace.
func (m *Manager) wireMacvlan(n *netw, e *endpoint, ns *os.File) error {
	parent, err := netlink.LinkByName(n.rec.Parent)
	if err != nil {
		return fmt.Errorf("cannot find parent link %s: %w", n.rec.Parent, err)
	}
	mode, err := macvlanMode(n.opts.macvlan)
	if err != nil {
		return err
	}
	l := &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{
		Name: e.IfName, ParentIndex: parent.Attrs().Index, HardwareAddr: e.MAC, Namespace: netlink.NsFd(int(ns.Fd())),
	}, Mode: mode}
	if n.opts.mtu != 0 {
		l.MTU = n.opts.mtu
	}
	if err := netlink.LinkAdd(l); err != nil {
		return fmt.Errorf("cannot create a macvlan link on %s: %w", n.rec.Parent, err)
	}
	in := bridge.Interface{Name: e.IfName, MAC: e.MAC, Addrs: e.prefixes()}
	if err := bridge.Configure(ns, in); err != nil {
		return errors.Join(err, bridge.DeleteInside(ns, e.IfName))
	}
	return nil
}
