package network

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"strings"
)

// zone is this engine's zone in firewalld. Forwarding is a matter between
// zones there, so our bridges need one of their own for an accept that concerns
// nothing else; two policies let it forward to and from any other. Towards the
// host itself it begins as a copy of the default zone, to which the bridges
// belonged until then.
type zone struct {
	name string
	// offline: firewalld does not run, so that only its files are changed.
	offline bool
}

func (m *Manager) zone() zone { return zone{name: "servin-" + m.tag} }

func (z zone) permanent(args ...string) []string {
	if z.offline {
		return append([]string{"firewall-offline-cmd"}, args...)
	}
	return append([]string{"firewall-cmd", "--permanent"}, args...)
}

// policies are their names with the zones that they are between.
func (z zone) policies() [][3]string {
	return [][3]string{{z.name + "-out", z.name, "ANY"}, {z.name + "-in", "ANY", z.name}}
}

// make defines the zone and its policies.
func (z zone) make(copyOf string) [][]string {
	out := [][]string{z.permanent("--new-zone-from-file="+copyOf, "--name="+z.name)}
	return append(out, z.join()...)
}

// join are the commands that define the policies.
func (z zone) join() (out [][]string) {
	for _, p := range z.policies() {
		out = append(out, z.permanent("--new-policy="+p[0]),
			z.permanent("--policy="+p[0], "--set-target=ACCEPT"),
			z.permanent("--policy="+p[0], "--add-ingress-zone="+p[1]),
			z.permanent("--policy="+p[0], "--add-egress-zone="+p[2]))
	}
	return out
}

// commands are what allow runs, as shown to people.
func (z zone) commands(links []string) [][]string {
	out := z.make("COPY-OF-THE-DEFAULT-ZONE.xml")
	for _, l := range links {
		out = append(out, z.permanent("--zone="+z.name, "--change-interface="+l))
	}
	return append(out, []string{"firewall-cmd", "--reload", "(settings that were not made permanent are lost)"})
}

// allow puts links into the zone and makes it first where need be. Only that
// needs firewalld to load its files anew.
func (z zone) allow(ctx context.Context, links []string) error {
	loaded, err := z.has(ctx, "firewall-cmd", "--get-policies")
	if err != nil {
		return err
	}
	defined, err := z.has(ctx, z.permanent("--get-policies")...)
	if err != nil {
		return err
	}
	if !defined {
		if err := z.define(ctx); err != nil {
			return err
		}
	}
	for _, l := range links {
		if _, err := tool(ctx, z.permanent("--zone="+z.name, "--change-interface="+l)...); err != nil {
			return err
		}
	}
	if !loaded {
		_, err := tool(ctx, "firewall-cmd", "--reload")
		return err
	}
	for _, l := range links {
		if _, err := tool(ctx, "firewall-cmd", "--zone="+z.name, "--change-interface="+l); err != nil {
			return err
		}
	}
	return nil
}

// has tells whether all our policies are in a list of such.
func (z zone) has(ctx context.Context, argv ...string) (bool, error) {
	list, err := tool(ctx, argv...)
	for _, p := range z.policies() {
		if !slices.Contains(strings.Fields(list), p[0]) {
			return false, err
		}
	}
	return true, err
}

// define writes the zone and its policies down. What an interrupted run left
// is replaced.
func (z zone) define(ctx context.Context) error {
	if err := z.undefine(ctx); err != nil {
		return err
	}
	def, err := tool(ctx, "firewall-cmd", "--get-default-zone")
	if err != nil {
		return err
	}
	path, err := tool(ctx, z.permanent("--path-zone="+def)...)
	if err != nil {
		return err
	}
	cmds := z.make(path)
	if _, err := tool(ctx, cmds[0]...); err != nil {
		return err
	}
	// The copy is of what the zone allows, not of who is in it.
	for _, of := range []string{"interface", "source"} {
		list, err := tool(ctx, z.permanent("--zone="+z.name, "--list-"+of+"s")...)
		if err != nil {
			return err
		}
		for _, x := range strings.Fields(list) {
			if _, err := tool(ctx, z.permanent("--zone="+z.name, "--remove-"+of+"="+x)...); err != nil {
				return err
			}
		}
	}
	return runAll(ctx, cmds[1:])
}

// undefine removes the definitions, where there are any.
func (z zone) undefine(ctx context.Context) error {
	list, err := tool(ctx, z.permanent("--get-policies")...)
	if err != nil {
		return err
	}
	for _, p := range z.policies() {
		if slices.Contains(strings.Fields(list), p[0]) {
			if _, err := tool(ctx, z.permanent("--delete-policy="+p[0])...); err != nil {
				return err
			}
		}
	}
	if list, err = tool(ctx, z.permanent("--get-zones")...); err != nil {
		return err
	}
	if slices.Contains(strings.Fields(list), z.name) {
		_, err = tool(ctx, z.permanent("--delete-zone="+z.name)...)
	}
	return err
}

// revoke takes links out of the zone. An empty zone's definition goes at once,
// and what firewalld has loaded of it when it is loaded anew: nothing refers to
// it, and a reload would cost the administrator what he did not make permanent.
func (z zone) revoke(ctx context.Context, links []string) error {
	if len(links) == 0 {
		return nil
	}
	var gone *exec.Error
	if _, err := tool(ctx, "firewall-cmd", "--state"); errors.As(err, &gone) {
		return nil // firewalld was removed from the host
	} else if err != nil {
		z.offline = true
	}
	var errs error
	for _, l := range links {
		if _, err := tool(ctx, z.permanent("--zone="+z.name, "--remove-interface="+l)...); err != nil {
			return err
		}
		if z.offline {
			continue
		}
		if _, err := tool(ctx, "firewall-cmd", "--zone="+z.name, "--remove-interface="+l); err != nil {
			errs = errors.Join(errs, err)
		}
	}
	left, err := tool(ctx, z.permanent("--zone="+z.name, "--list-interfaces")...)
	if err == nil && left == "" {
		err = z.undefine(ctx)
	}
	return errors.Join(errs, err)
}
