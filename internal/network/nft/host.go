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

// Chain is a chain of the host's that drops forwarded packets.
type Chain struct {
	Kind   Kind
	family nftables.TableFamily
	table  string
	name   string
	// insert is the chain that an accept belongs into, mostly the same.
	insert string
	// Accepts names the links for which both directions are accepted.
	Accepts map[string]bool
}

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
	names := map[string]bool{}
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
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			continue // it went meanwhile
		}
		// firewalld has an accepting policy and rejects in its last rule.
		if n := len(rules); n > 0 && unconditional(rules[n-1]) {
			dropping = true
		}
		if !dropping {
			continue
		}
		f := Chain{family: ch.Table.Family, table: ch.Table.Name, name: ch.Name, insert: ch.Name, Accepts: map[string]bool{}}
		switch {
		case ch.Table.Name == "firewalld":
			f.Kind = Firewalld
		case names[key(ch, "ufw-user-forward")] || names[key(ch, "ufw6-user-forward")]:
			f.Kind = UFW
		case names[key(ch, "DOCKER-USER")]:
			f.Kind, f.insert = Docker, "DOCKER-USER"
		}
		in, out := map[string]bool{}, map[string]bool{}
		read := func(rules []*nftables.Rule) {
			for _, r := range rules {
				if name, iif, ok := acceptsLink(r); ok && iif {
					in[name] = true
				} else if ok {
					out[name] = true
				}
			}
		}
		read(rules)
		for _, sub := range []string{f.insert, "ufw-user-forward", "ufw6-user-forward"} {
			if sub != ch.Name && names[key(ch, sub)] {
				if more, err := c.GetRules(ch.Table, &nftables.Chain{Name: sub, Table: ch.Table}); err == nil {
					read(more)
				}
			}
		}
		for l := range in {
			f.Accepts[l] = out[l]
		}
		h.Forward = append(h.Forward, f)
	}
	b, err := os.ReadFile("/proc/net/ip_tables_names")
	h.Legacy = err == nil && bytes.Contains(b, []byte("filter"))
	return h, nil
}

// unconditional tells whether a rule drops or rejects whatever comes.
func unconditional(r *nftables.Rule) bool {
	for _, e := range r.Exprs {
		switch x := e.(type) {
		case *expr.Counter:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return x.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
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
