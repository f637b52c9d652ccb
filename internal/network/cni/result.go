package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"
)

// Bounds of a result; a plugin that goes beyond lies.
const (
	maxInterfaces = 256
	maxIPs        = 256
	maxRoutes     = 4096
	maxDNS        = 64
	maxText       = 256
)

// Result is what an attachment came to be.
type Result struct {
	Network    string
	Interfaces []Interface
	IPs        []IP
	DNS        DNS
	// raw is the plugin's own result.
	raw json.RawMessage
}

// Raw is the result as the last plugin gave it.
func (r Result) Raw() json.RawMessage { return r.raw }

// Interface is a link that the plugins made or use; Sandbox is "" for those of
// the host.
type Interface struct{ Name, MAC, Sandbox string }

// IP is an address; Interface is an index into Result.Interfaces or -1.
type IP struct {
	Address   netip.Prefix
	Gateway   netip.Addr
	Interface int
}

// Inside lists the addresses of the container itself: those of interfaces in a
// sandbox, or of none named.
func (r Result) Inside() (out []IP) {
	for _, ip := range r.IPs {
		if ip.Interface < 0 || r.Interfaces[ip.Interface].Sandbox != "" {
			out = append(out, ip)
		}
	}
	return out
}

// MAC is the hardware address of an interface in the sandbox.
func (r Result) MAC(ifName string) net.HardwareAddr {
	for _, i := range r.Interfaces {
		if i.Name == ifName && i.Sandbox != "" {
			if m, err := net.ParseMAC(i.MAC); err == nil {
				return m
			}
		}
	}
	return nil
}

// decodeTyped turns a plugin's output into the library's type. What the
// library's conversions fall over must not take the engine with it.
func decodeTyped(b []byte, confVersion string) (res types.Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			res, err = nil, fmt.Errorf("the result makes no sense: %v", p)
		}
	}()
	if err := noNulls(b); err != nil {
		return nil, err
	}
	var v struct {
		CNIVersion string `json:"cniVersion"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, fmt.Errorf("the result is no JSON object: %w", err)
	}
	if v.CNIVersion == "" {
		// As libcni does: a result without a version has the configuration's.
		var m map[string]json.RawMessage
		if err := json.Unmarshal(b, &m); err != nil || m == nil {
			return nil, errors.New("the result is no JSON object")
		}
		if m["cniVersion"], err = json.Marshal(confVersion); err != nil {
			return nil, err
		}
		if b, err = json.Marshal(m); err != nil {
			return nil, err
		}
		v.CNIVersion = confVersion
	}
	if res, err = create.Create(v.CNIVersion, b); err != nil {
		return nil, err
	}
	// prevResult and the record are in the configuration's version.
	return res.GetAsVersion(confVersion)
}

// noNulls refuses null as an element of a list: the library takes elements to be
// there.
func noNulls(b []byte) error {
	dec := json.NewDecoder(bytes.NewReader(b))
	var lists []bool // of the open brackets, whether each is a list
	for {
		t, err := dec.Token()
		if err != nil {
			return nil // the end, or what Unmarshal will complain about
		}
		switch t {
		case json.Delim('['), json.Delim('{'):
			if len(lists) > 64 {
				return errors.New("the result is nested too deeply")
			}
			lists = append(lists, t == json.Delim('['))
		case json.Delim(']'), json.Delim('}'):
			lists = lists[:len(lists)-1]
		case nil:
			if len(lists) > 0 && lists[len(lists)-1] {
				return errors.New("the result has null in a list")
			}
		}
	}
}

// decodeResult understands a result in any version.
func decodeResult(b []byte) (Result, error) {
	t, err := decodeTyped(b, types100.ImplementedSpecVersion)
	if err != nil {
		return Result{}, err
	}
	return fromTyped(t, b)
}

func fromTyped(t types.Result, raw []byte) (out Result, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the result makes no sense: %v", p)
		}
	}()
	r, err := types100.GetResult(t)
	if err != nil {
		return Result{}, err
	}
	if len(r.Interfaces) > maxInterfaces || len(r.IPs) > maxIPs || len(r.Routes) > maxRoutes || len(r.DNS.Nameservers) > maxDNS || len(r.DNS.Search) > maxDNS || len(r.DNS.Options) > maxDNS {
		return Result{}, errors.New("the result has more interfaces, addresses, routes or names than make sense")
	}
	out.raw = raw
	for _, i := range r.Interfaces {
		if i == nil {
			return Result{}, errors.New("the result has an interface that is null")
		}
		if len(i.Name) > maxText || len(i.Mac) > maxText || len(i.Sandbox) > 4096 {
			return Result{}, errors.New("the result has an interface with a name too long")
		}
		out.Interfaces = append(out.Interfaces, Interface{clean(i.Name), clean(i.Mac), clean(i.Sandbox)})
	}
	for _, c := range r.IPs {
		if c == nil {
			return Result{}, errors.New("the result has an address that is null")
		}
		ip := IP{Interface: -1}
		a, ok := netip.AddrFromSlice(c.Address.IP)
		ones, bits := c.Address.Mask.Size()
		if a = a.Unmap(); !ok || bits == 0 || a.IsUnspecified() || a.IsMulticast() {
			return Result{}, fmt.Errorf("the result has an address %s that no container can have", clean(c.Address.String()))
		}
		if bits == 128 && a.Is4() {
			ones -= 96
		}
		if ip.Address = netip.PrefixFrom(a, ones); !ip.Address.IsValid() {
			return Result{}, fmt.Errorf("the result has an address %s whose prefix makes no sense", clean(c.Address.String()))
		}
		if g, ok := netip.AddrFromSlice(c.Gateway); ok {
			ip.Gateway = g.Unmap()
		}
		if c.Interface != nil {
			if *c.Interface < 0 || *c.Interface >= len(out.Interfaces) {
				return Result{}, fmt.Errorf("the result has an address of interface %d, of %d", *c.Interface, len(out.Interfaces))
			}
			ip.Interface = *c.Interface
		}
		out.IPs = append(out.IPs, ip)
	}
	for _, s := range r.DNS.Nameservers {
		if a, err := netip.ParseAddr(s); err == nil {
			out.DNS.Servers = append(out.DNS.Servers, a.String())
		}
	}
	out.DNS.Searches, out.DNS.Options = words(r.DNS.Search), words(r.DNS.Options)
	return out, nil
}

// words keeps what can stand in a resolv.conf as one word.
func words(in []string) (out []string) {
next:
	for _, s := range in {
		if s == "" || len(s) > maxText {
			continue
		}
		for _, c := range []byte(s) {
			if c <= ' ' || c >= 0x7f {
				continue next
			}
		}
		out = append(out, s)
	}
	return out
}
