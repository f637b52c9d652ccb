package nft

import (
	"bytes"
	"fmt"
	"os"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// Kind is who keeps a chain of the host's firewall.
type Kind uint8

// The keepers that are told apart.
const (
	Admin Kind = iota // rules loaded by an administrator
	Docker
	UFW
	Firewalld
)

// Chain is a chain of the host's through which forwarded packets go.
type Chain struct {
	Kind   Kind
	family nftables.TableFamily
	table  string
	name   string
	// insert is the chain that an accept belongs into, mostly the same.
	insert string
	drops  bool // its policy
	view   *view
}

// Passes tells whether the chain lets the first packet of a connection go from
// one link to another, as far as rules tell by links alone: what a rule asks
// besides that is taken not to hold.
func (c Chain) Passes(in, out string) bool {
	switch c.view.walk(c.name, in, out, 0) {
	case accepted:
		return true
	case dropped:
		return false
	}
	return !c.drops
}

// Six tells whether the chain sees IPv6 alone.
func (c Chain) Six() bool { return c.family == nftables.TableFamilyIPv6 }

func (c Chain) String() string {
	who := map[Kind]string{Admin: "chain", Docker: "Docker's chain", UFW: "ufw's chain", Firewalld: "firewalld's chain"}[c.Kind]
	return who + " " + familyName(c.family) + " " + c.table + " " + c.name
}

// Where names the chain to put an accept into, as nft takes it.
func (c Chain) Where() string {
	return familyName(c.family) + " " + c.table + " " + c.insert
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "ip"
}

// Host is what of the host's firewall matters to us.
type Host struct {
	// Forward are all filtering chains at the forward hook.
	Forward []Chain
	// OutputDrops names an output chain whose policy is drop.
	OutputDrops string
	Firewalld   bool
	// Legacy: there are rules of iptables-legacy, which cannot be read here.
	Legacy bool
}

// Inspect reads the host's firewall but for the tables named ours.
func Inspect(ours string) (Host, error) {
	var h Host
	c, err := nftables.New()
	if err != nil {
		return h, fmt.Errorf("cannot open nftables: %w", err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return h, fmt.Errorf("cannot list the chains of nftables: %w", err)
	}
	names, views := map[string]bool{}, map[string]*view{}
	key := func(ch *nftables.Chain, name string) string {
		return fmt.Sprint(ch.Table.Family, "\x00", ch.Table.Name, "\x00", name)
	}
	for _, ch := range chains {
		names[key(ch, ch.Name)] = true
		h.Firewalld = h.Firewalld || ch.Table.Name == "firewalld"
	}
	for _, ch := range chains {
		if ch.Table.Name == ours || strings.HasPrefix(ch.Table.Name, "servin_") || ch.Hooknum == nil || ch.Type != nftables.ChainTypeFilter {
			continue
		}
		switch ch.Table.Family {
		case nftables.TableFamilyIPv4, nftables.TableFamilyIPv6, nftables.TableFamilyINet:
		default:
			continue
		}
		dropping := ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		if *ch.Hooknum == *nftables.ChainHookOutput && dropping && h.OutputDrops == "" {
			h.OutputDrops = familyName(ch.Table.Family) + " " + ch.Table.Name + " " + ch.Name
		}
		if *ch.Hooknum != *nftables.ChainHookForward {
			continue
		}
		tab := fmt.Sprint(ch.Table.Family, "\x00", ch.Table.Name)
		if views[tab] == nil {
			views[tab] = newView(c, ch.Table, chains)
		}
		f := Chain{family: ch.Table.Family, table: ch.Table.Name, name: ch.Name, insert: ch.Name, drops: dropping, view: views[tab]}
		switch {
		case ch.Table.Name == "firewalld":
			f.Kind = Firewalld
		case names[key(ch, "ufw-user-forward")] || names[key(ch, "ufw6-user-forward")]:
			f.Kind = UFW
		case names[key(ch, "DOCKER-USER")]:
			f.Kind, f.insert = Docker, "DOCKER-USER"
		}
		h.Forward = append(h.Forward, f)
	}
	b, err := os.ReadFile("/proc/net/ip_tables_names")
	h.Legacy = err == nil && bytes.Contains(b, []byte("filter"))
	return h, nil
}

// acceptsLink reads a rule that does nothing but accept what comes in from,
// or goes out to, one link.
func acceptsLink(r *nftables.Rule) (name string, iif, ok bool) {
	accept, meta := false, false
	for _, e := range r.Exprs {
		switch x := e.(type) {
		case *expr.Counter:
		case *expr.Meta:
			if meta || x.Key != expr.MetaKeyIIFNAME && x.Key != expr.MetaKeyOIFNAME {
				return "", false, false
			}
			meta, iif = true, x.Key == expr.MetaKeyIIFNAME
		case *expr.Cmp:
			if x.Op != expr.CmpOpEq || !meta {
				return "", false, false
			}
			name = unix.ByteSliceToString(x.Data)
		case *expr.Verdict:
			accept = x.Kind == expr.VerdictAccept
		default:
			return "", false, false
		}
	}
	return name, iif, accept && name != ""
}

// Allow inserts an accept for both directions of each link. The comment is
// what Revoke knows them by.
func (c Chain) Allow(links []string, comment string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open nftables: %w", err)
	}
	tab := &nftables.Table{Name: c.table, Family: c.family}
	for _, l := range links {
		for _, key := range []expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME} {
			conn.InsertRule(&nftables.Rule{Table: tab, Chain: &nftables.Chain{Name: c.insert, Table: tab}, UserData: userdata.AppendString(nil, userdata.TypeComment, comment), Exprs: []expr.Any{
				&expr.Meta{Key: key, Register: unix.NFT_REG_1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: ifname(l)},
				&expr.Counter{},
				&expr.Verdict{Kind: expr.VerdictAccept},
			}})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("cannot add the accept to %s: %w", c, err)
	}
	return nil
}

// Revoke removes the accepts that Allow made under the comment, for the link
// of that name or, if it is "", for all.
func Revoke(comment, link string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("cannot open nftables: %w", err)
	}
	chains, err := conn.ListChains()
	if err != nil {
		return fmt.Errorf("cannot list the chains of nftables: %w", err)
	}
	n := 0
	for _, ch := range chains {
		rules, err := conn.GetRules(ch.Table, ch)
		if err != nil {
			continue
		}
		for _, r := range rules {
			if c, ok := userdata.GetString(r.UserData, userdata.TypeComment); !ok || c != comment {
				continue
			}
			if name, _, ok := acceptsLink(r); !ok || link != "" && name != link {
				continue
			}
			if err := conn.DelRule(r); err != nil {
				return fmt.Errorf("cannot encode the removal of a rule: %w", err)
			}
			n++
		}
	}
	if n == 0 {
		return nil
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("cannot remove accepts from the host's firewall: %w", err)
	}
	return nil
}
