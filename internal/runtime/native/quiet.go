package native

import (
	"context"
	"errors"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// quietTable drops everything in the network namespace that it is in.
const quietTable = "servin-quiet"

// Quiet implements runtime.Checkpointer.
func (t *task) Quiet(_ context.Context, on bool) error {
	ns, err := t.NetNS()
	if err != nil {
		return err
	}
	defer ns.Close()
	var own, host unix.Stat_t
	if unix.Fstat(int(ns.Fd()), &own) != nil || unix.Stat("/proc/self/ns/net", &host) != nil || own.Ino == host.Ino {
		return nil // the host's, which is not ours to cut off
	}
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return fault.New(fault.Internal, "cannot reach the container's packet filter: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: quietTable}
	if !on {
		c.DelTable(table)
		if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
			return fault.New(fault.Internal, "cannot give the container its network back: %w", err)
		}
		return nil
	}
	c.AddTable(table)
	for name, hook := range map[string]*nftables.ChainHook{"in": nftables.ChainHookPrerouting, "out": nftables.ChainHookOutput} {
		chain := c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFirst})
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}})
	}
	if err := c.Flush(); err != nil {
		return fault.New(fault.Internal, "cannot cut the container off its network: %w", err)
	}
	return nil
}
