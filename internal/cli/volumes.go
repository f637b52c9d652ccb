package cli

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/client"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
	"github.com/cloudos-io/cloudos/internal/cli/notation"
)

func (a *App) volumes() []*command.Command {
	return []*command.Command{a.cmdVolumeLs(), a.cmdVolumeCreate(), a.cmdVolumeRm(), a.cmdInspectVolume(), a.cmdVolumePrune(),
		a.cmdVolumeBackup(), a.cmdVolumeRestore(), a.cmdVolumeExport(), a.cmdVolumeImport(), a.cmdVolumeClone()}
}

func (a *App) cmdVolumeLs() *command.Command {
	var o listFlags
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Short: "List volumes",
		Flags: func(f *command.FlagSet) { o.declare(f, false) },
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.VolumeList(ctx, filters)
			if err != nil {
				return err
			}
			a.warn(r.Warnings)
			o.fromFile = a.cfg.VolumesFormat
			slices.SortFunc(r.Volumes, func(x, y volume.Volume) int { return naturally(x.Name, y.Name) })
			if o.json {
				return format.JSONLines(a.out, r.Volumes)
			}
			return volumeColumns().Print(a.out, r.Volumes, o.options())
		}}
}

func volumeColumns() *format.List[volume.Volume] {
	type V = volume.Volume
	return &format.List[V]{
		Quiet: "Name", Table: []string{"Driver", "Name"},
		Labels: func(v V) map[string]string { return v.Labels },
		Columns: []format.Column[V]{
			{Name: "Driver", Heading: "DRIVER", Text: func(v V) string { return v.Driver }},
			{Name: "Name", Heading: "VOLUME NAME", Text: func(v V) string { return v.Name }},
			{Name: "Scope", Heading: "SCOPE", Text: func(v V) string { return v.Scope }},
			{Name: "Mountpoint", Heading: "MOUNTPOINT", Text: func(v V) string { return v.Mountpoint }},
			{Name: "Labels", Heading: "LABELS", Text: func(v V) string { return labelText(v.Labels) }},
			{Name: "Links", Heading: "LINKS", Text: func(v V) string {
				if v.UsageData == nil {
					return "N/A"
				}
				return strconv.FormatInt(v.UsageData.RefCount, 10)
			}},
			{Name: "Size", Heading: "SIZE", Text: func(v V) string {
				if v.UsageData == nil {
					return "N/A"
				}
				return unknown(v.UsageData.Size, format.Size)
			}},
			{Name: "Availability", Heading: "AVAILABILITY", Text: func(V) string { return "N/A" }},
			{Name: "Group", Heading: "GROUP", Text: func(V) string { return "N/A" }},
			{Name: "Status", Heading: "STATUS", Text: func(V) string { return "N/A" }},
		}}
}

func (a *App) cmdVolumeCreate() *command.Command {
	req := volume.CreateRequest{}
	name := ""
	var opts, labels []string
	return &command.Command{Name: "create", Args: "[VOLUME]", Short: "Make a volume", Max: 1,
		Flags: func(f *command.FlagSet) {
			f.String(&req.Driver, "driver", "d", "Driver of the volume (default local)")
			f.Strings(&opts, "opt", "o", "Option of the driver, key=value")
			f.Strings(&labels, "label", "", "Set a label")
			f.String(&name, "name", "", "").Hide()
		},
		Run: func(ctx context.Context, args []string) error {
			if req.Name = name; len(args) == 1 {
				if name != "" && name != args[0] {
					return usagef("the volume has two names: %s and %s", name, args[0])
				}
				req.Name = args[0]
			}
			var err error
			if req.DriverOpts, err = notation.Map(opts); err != nil {
				return exitWith(exitEngine, err)
			}
			if req.Labels, err = notation.Map(labels); err != nil {
				return exitWith(exitEngine, err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			v, err := c.VolumeCreate(ctx, req)
			if err != nil {
				return err
			}
			fmt.Fprintln(a.out, v.Name)
			return nil
		}}
}

func (a *App) cmdVolumeRm() *command.Command {
	force := false
	return &command.Command{Name: "rm", Aliases: []string{"remove"}, Args: "VOLUME [VOLUME...]", Short: "Remove volumes and what is in them", Min: 1, Max: -1, Complete: []string{"volume"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&force, "force", "f", "It is no failure when a volume does not exist")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.eachName(args, func(n string) error {
				err := c.VolumeRemove(ctx, n, force)
				if force && client.IsNotFound(err) {
					return nil
				}
				return err
			})
		}}
}

func (a *App) networks() []*command.Command {
	return []*command.Command{a.cmdNetworkLs(), a.cmdNetworkCreate(), a.cmdNetworkRm(), a.cmdInspectNetwork(), a.cmdNetworkConnect(), a.cmdNetworkDisconnect(), a.cmdNetworkPrune()}
}

func (a *App) cmdNetworkLs() *command.Command {
	var o listFlags
	return &command.Command{Name: "ls", Aliases: []string{"list"}, Short: "List networks",
		Flags: func(f *command.FlagSet) { o.declare(f, true) },
		Run: func(ctx context.Context, args []string) error {
			filters, err := readFilters(o.filters)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.NetworkList(ctx, filters)
			if err != nil {
				return err
			}
			o.fromFile = a.cfg.NetworksFormat
			slices.SortFunc(list, func(x, y network.Summary) int { return cmp.Or(naturally(x.Name, y.Name), cmp.Compare(x.ID, y.ID)) })
			if o.json {
				return format.JSONLines(a.out, list)
			}
			return networkColumns(o.noTrunc).Print(a.out, list, o.options())
		}}
}

func networkColumns(noTrunc bool) *format.List[network.Summary] {
	type N = network.Summary
	return &format.List[N]{
		Quiet: "ID", Table: []string{"ID", "Name", "Driver", "Scope"},
		Labels: func(n N) map[string]string { return n.Labels },
		Columns: []format.Column[N]{
			{Name: "ID", Heading: "NETWORK ID", Text: func(n N) string { return trunc(n.ID, noTrunc) }},
			{Name: "Name", Heading: "NAME", Text: func(n N) string { return n.Name }},
			{Name: "Driver", Heading: "DRIVER", Text: func(n N) string { return n.Driver }},
			{Name: "Scope", Heading: "SCOPE", Text: func(n N) string { return n.Scope }},
			{Name: "IPv4", Heading: "IPV4", Text: func(n N) string { return strconv.FormatBool(n.EnableIPv4) }},
			{Name: "IPv6", Heading: "IPV6", Text: func(n N) string { return strconv.FormatBool(n.EnableIPv6) }},
			{Name: "Internal", Heading: "INTERNAL", Text: func(n N) string { return strconv.FormatBool(n.Internal) }},
			{Name: "Labels", Heading: "LABELS", Text: func(n N) string { return labelText(n.Labels) }},
			{Name: "CreatedAt", Heading: "CREATED AT", Text: func(n N) string { return n.Created.String() }},
		}}
}

// networkFlags are the options of network create.
type networkFlags struct {
	driver, configFrom, scope                    string
	ipamDriver                                   string
	subnets, gateways, ranges, aux, opts, labels []string
	ipamOpts                                     []string
	internal, attachable, ingress, configOnly    bool
	ipv4, ipv6                                   *bool
}

func (a *App) cmdNetworkCreate() *command.Command {
	var o networkFlags
	return &command.Command{Name: "create", Args: "NETWORK", Short: "Make a network", Min: 1, Max: 1,
		Example: "servin networks create --subnet 10.9.0.0/24 app-net",
		Flags: func(f *command.FlagSet) {
			f.String(&o.driver, "driver", "d", "Driver of the network (default bridge)")
			f.Strings(&o.subnets, "subnet", "", "Subnet, such as 10.9.0.0/24")
			f.Strings(&o.gateways, "gateway", "", "Address of the gateway in a subnet")
			f.Strings(&o.ranges, "ip-range", "", "Part of a subnet that containers get addresses from")
			f.Add("aux-address", "", "map", "Address of a subnet that is taken, name=ip", func(s string) error { o.aux = append(o.aux, s); return nil })
			f.Strings(&o.opts, "opt", "o", "Option of the driver, key=value")
			f.Strings(&o.labels, "label", "", "Set a label")
			f.String(&o.ipamDriver, "ipam-driver", "", "Driver of address management")
			f.Strings(&o.ipamOpts, "ipam-opt", "", "Option of address management, key=value")
			f.Bool(&o.internal, "internal", "", "Keep it from the outside world")
			f.Bool(&o.attachable, "attachable", "", "Let containers attach by hand")
			f.Bool(&o.ingress, "ingress", "", "").Hide()
			f.Bool(&o.configOnly, "config-only", "", "Keep the settings only")
			f.String(&o.configFrom, "config-from", "", "Take the settings of this network")
			f.String(&o.scope, "scope", "", "Scope of the network")
			f.OptBool(&o.ipv4, "ipv4", "", "Give IPv4 addresses")
			f.OptBool(&o.ipv6, "ipv6", "", "Give IPv6 addresses")
		},
		Run: func(ctx context.Context, args []string) error {
			req, err := o.request(args[0])
			if err != nil {
				return exitWith(exitEngine, err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.NetworkCreate(ctx, req)
			if err != nil {
				return err
			}
			if r.Warning != "" {
				a.warn([]string{r.Warning})
			}
			fmt.Fprintln(a.out, r.ID)
			return nil
		}}
}

func (o *networkFlags) request(name string) (network.CreateRequest, error) {
	req := network.CreateRequest{Name: name, Driver: o.driver, Scope: o.scope, Internal: o.internal, Attachable: o.attachable,
		Ingress: o.ingress, ConfigOnly: o.configOnly, EnableIPv4: o.ipv4, EnableIPv6: o.ipv6}
	if req.Driver == "" && o.configFrom == "" {
		req.Driver = "bridge"
	}
	if o.configFrom != "" {
		req.ConfigFrom = &network.ConfigReference{Network: o.configFrom}
	}
	var err error
	if req.Options, err = notation.Map(o.opts); err != nil {
		return req, err
	}
	if req.Labels, err = notation.Map(o.labels); err != nil {
		return req, err
	}
	ipamOpts, err := notation.Map(o.ipamOpts)
	if err != nil {
		return req, err
	}
	cfg, err := o.subnetList()
	if err != nil {
		return req, err
	}
	if len(cfg) > 0 || o.ipamDriver != "" || len(ipamOpts) > 0 {
		req.IPAM = &network.IPAM{Driver: o.ipamDriver, Options: ipamOpts, Config: cfg}
	}
	return req, nil
}

// subnetList puts each gateway, range and taken address to its subnet.
func (o *networkFlags) subnetList() ([]network.IPAMConfig, error) {
	cfg := make([]network.IPAMConfig, 0, len(o.subnets))
	for _, s := range o.subnets {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("subnet %q is not ADDRESS/BITS", s)
		}
		for _, c := range cfg {
			if c.Subnet.Overlaps(p) {
				return nil, fmt.Errorf("subnets %s and %s overlap", c.Subnet, p)
			}
		}
		cfg = append(cfg, network.IPAMConfig{Subnet: p})
	}
	of := func(what string, a netip.Addr) (*network.IPAMConfig, error) {
		for i := range cfg {
			if cfg[i].Subnet.Contains(a) {
				return &cfg[i], nil
			}
		}
		return nil, fmt.Errorf("%s %s lies in none of the subnets given: add --subnet", what, a)
	}
	for _, s := range o.gateways {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return nil, fmt.Errorf("gateway %q is not an address", s)
		}
		c, err := of("gateway", a)
		if err != nil {
			return nil, err
		}
		if c.Gateway.IsValid() {
			return nil, fmt.Errorf("subnet %s has two gateways", c.Subnet)
		}
		c.Gateway = a
	}
	for _, s := range o.ranges {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("range %q is not ADDRESS/BITS", s)
		}
		c, err := of("range", p.Addr())
		if err != nil {
			return nil, err
		}
		if c.IPRange.IsValid() || p.Bits() < c.Subnet.Bits() {
			return nil, fmt.Errorf("range %s does not fit subnet %s, or is its second", p, c.Subnet)
		}
		c.IPRange = p
	}
	for _, s := range o.aux {
		k, v, err := notation.KeyValue(s)
		if err != nil {
			return nil, err
		}
		a, err := netip.ParseAddr(v)
		if err != nil {
			return nil, fmt.Errorf("taken address %q is not name=ip", s)
		}
		c, err := of("address", a)
		if err != nil {
			return nil, err
		}
		if c.AuxAddress == nil {
			c.AuxAddress = map[string]netip.Addr{}
		}
		c.AuxAddress[k] = a
	}
	return cfg, nil
}

func (a *App) cmdNetworkRm() *command.Command {
	force := false
	return &command.Command{Name: "rm", Aliases: []string{"remove"}, Args: "NETWORK [NETWORK...]", Short: "Remove networks", Min: 1, Max: -1, Complete: []string{"network"},
		Flags: func(f *command.FlagSet) {
			f.Bool(&force, "force", "f", "It is no failure when a network does not exist")
		},
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return a.eachName(args, func(n string) error {
				err := c.NetworkRemove(ctx, n)
				if force && client.IsNotFound(err) {
					return nil
				}
				return err
			})
		}}
}

func (a *App) cmdNetworkConnect() *command.Command {
	var aliases, links, linkLocal, opts []string
	var ip, ip6 string
	priority := 0
	return &command.Command{Name: "connect", Args: "NETWORK CONTAINER", Short: "Connect a container to a network", Min: 2, Max: 2, Complete: []string{"network", "container"},
		Flags: func(f *command.FlagSet) {
			f.Strings(&aliases, "alias", "", "Another name of the container on the network")
			f.Strings(&links, "link", "", "Link to another container, NAME[:ALIAS]").Of("container")
			f.Strings(&linkLocal, "link-local-ip", "", "Link-local address")
			f.Strings(&opts, "driver-opt", "", "Option of the driver, key=value")
			f.String(&ip, "ip", "", "IPv4 address")
			f.String(&ip6, "ip6", "", "IPv6 address")
			f.Int(&priority, "gw-priority", "", "The network with the highest has the default route")
		},
		Run: func(ctx context.Context, args []string) error {
			n := notation.Network{Settings: network.EndpointSettings{Aliases: aliases, Links: links, GwPriority: priority}}
			var err error
			if len(opts) > 0 {
				n.Settings.DriverOpts, err = notation.Map(opts)
			}
			if err == nil && ip != "" {
				err = n.SetIP(ip)
			}
			if err == nil && ip6 != "" {
				err = n.SetIP6(ip6)
			}
			for _, l := range linkLocal {
				if err == nil {
					err = n.AddLinkLocal(l)
				}
			}
			if err != nil {
				return exitWith(exitEngine, err)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.NetworkConnect(ctx, args[0], network.ConnectRequest{Container: args[1], EndpointConfig: &n.Settings})
		}}
}

func (a *App) cmdNetworkDisconnect() *command.Command {
	force := false
	return &command.Command{Name: "disconnect", Args: "NETWORK CONTAINER", Short: "Disconnect a container from a network", Min: 2, Max: 2, Complete: []string{"network", "container"},
		Flags: func(f *command.FlagSet) { f.Bool(&force, "force", "f", "Disconnect even what is half gone") },
		Run: func(ctx context.Context, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			return c.NetworkDisconnect(ctx, args[0], network.DisconnectRequest{Container: args[1], Force: force})
		}}
}
