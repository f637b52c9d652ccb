package dockerapi

import "github.com/cloudos-io/cloudos/api"

// routes is the whole API. {id} holds no slash, {name} may. docs/api.md is
// written from this table by TestRouteDocs -update.
func routes(c Config) []route {
	ctr := containersAPI{c.Containers}
	exe := execAPI{c.Containers}
	img := imagesAPI{c.Images, c.System}
	net := networksAPI{c.Networks}
	vol := volumesAPI{c.Volumes}
	cpy := volumeCopiesAPI{c.VolumeCopies}
	chk := checkpointsAPI{c.Checkpoints}
	pol, adt := policyAPI{c.Policy}, auditAPI{c.Audit}
	sec, cnf := secretsAPI{c.Secrets, api.KindSecret}, secretsAPI{c.Secrets, api.KindConfig}
	sys := systemAPI{c.System, c.Builds}
	bld := buildsAPI{c.Builds, c.System}
	own := servinAPI{c.Containers, c.System, c.Version, c.Problems, c.Builds}
	alerts, dbg := alertAPI{c.Alerts}, debugShellAPI{c.DebugShell, c.System}
	system := osAPI{c.OS, c.System}
	lse := leaseAPI{c.Containers, c.Networks, c.Volumes, c.Logger, leaseGrace, &leases{n: map[string]int{}}}

	return []route{
		{"GET", "/_ping", 0, ping},
		{"HEAD", "/_ping", 0, ping},
		{"GET", "/version", 0, sys.version},
		{"GET", "/info", 0, sys.info},
		{"GET", "/events", 0, sys.events},
		{"GET", "/system/df", 25, sys.diskUsage},
		{"POST", "/auth", 0, img.login},

		{"GET", "/containers/json", 0, ctr.list},
		{"POST", "/containers/create", 0, ctr.create},
		{"POST", "/containers/prune", 25, ctr.prune},
		{"GET", "/containers/{name}/json", 0, ctr.inspect},
		{"GET", "/containers/{id}/top", 0, ctr.top},
		{"GET", "/containers/{id}/logs", 0, ctr.logs},
		{"GET", "/containers/{id}/changes", 0, ctr.changes},
		{"GET", "/containers/{id}/export", 0, ctr.export},
		{"GET", "/containers/{id}/stats", 0, ctr.stats},
		{"GET", "/containers/{id}/attach/ws", 0, ctr.attachWS},
		{"HEAD", "/containers/{id}/archive", 0, ctr.archiveHead},
		{"GET", "/containers/{id}/archive", 0, ctr.archiveGet},
		{"PUT", "/containers/{id}/archive", 0, ctr.archivePut},
		{"POST", "/containers/{id}/start", 0, ctr.start},
		{"POST", "/containers/{id}/stop", 0, ctr.stop},
		{"POST", "/containers/{id}/restart", 0, ctr.restart},
		{"POST", "/containers/{id}/kill", 0, ctr.kill},
		{"POST", "/containers/{id}/pause", 0, ctr.pause},
		{"POST", "/containers/{id}/unpause", 0, ctr.unpause},
		{"POST", "/containers/{id}/rename", 0, ctr.rename},
		{"POST", "/containers/{id}/update", 0, ctr.update},
		{"POST", "/containers/{id}/resize", 0, ctr.resize},
		{"POST", "/containers/{id}/wait", 0, ctr.wait},
		{"POST", "/containers/{id}/attach", 0, ctr.attach},
		{"POST", "/containers/{id}/exec", 0, exe.create},
		{"DELETE", "/containers/{name}", 0, ctr.remove},
		{"POST", "/commit", 0, ctr.commit},
		{"POST", "/containers/{id}/checkpoints", 25, chk.create},
		{"GET", "/containers/{id}/checkpoints", 25, chk.list},
		{"DELETE", "/containers/{id}/checkpoints/{checkpoint}", 25, chk.remove},

		{"POST", "/exec/{id}/start", 0, exe.start},
		{"POST", "/exec/{id}/resize", 0, exe.resize},
		{"GET", "/exec/{id}/json", 0, exe.inspect},

		{"GET", "/images/json", 0, img.list},
		{"GET", "/images/search", 0, img.search},
		{"GET", "/images/get", 0, img.save},
		{"POST", "/images/load", 0, img.load},
		{"POST", "/images/create", 0, img.create},
		{"POST", "/images/prune", 25, img.prune},
		{"GET", "/images/{name}/json", 0, img.inspect},
		{"GET", "/images/{name}/history", 0, img.history},
		{"GET", "/images/{name}/get", 0, img.save},
		{"GET", "/images/{name}/attestations", 55, img.attestations},
		{"POST", "/images/{name}/push", 0, img.push},
		{"POST", "/images/{name}/tag", 0, img.tag},
		{"DELETE", "/images/{name}", 0, img.remove},
		{"GET", "/distribution/{name}/json", 30, img.distribution},

		{"GET", "/networks", 0, net.list},
		{"GET", "/networks/", 0, net.list},
		{"POST", "/networks/create", 0, net.create},
		{"POST", "/networks/prune", 25, net.prune},
		{"GET", "/networks/{id}", 0, net.inspect},
		{"POST", "/networks/{id}/connect", 0, net.connect},
		{"POST", "/networks/{id}/disconnect", 0, net.disconnect},
		{"DELETE", "/networks/{id}", 0, net.remove},

		{"GET", "/volumes", 0, vol.list},
		{"POST", "/volumes/create", 0, vol.create},
		{"POST", "/volumes/prune", 25, vol.prune},
		{"GET", "/volumes/{id}", 0, vol.inspect},
		{"PUT", "/volumes/{id}", 42, vol.update},
		{"DELETE", "/volumes/{id}", 0, vol.remove},

		{"POST", "/build", 0, bld.build},
		{"POST", "/build/cancel", 31, bld.cancel},
		{"POST", "/build/prune", 31, bld.prune},
		{"POST", "/session", 31, bld.session},
		{"POST", "/grpc", 31, bld.grpc},

		{"GET", "/plugins", 0, noPlugins},
		{"GET", "/plugins/privileges", 0, pluginsUnsupported},
		{"POST", "/plugins/pull", 0, pullPlugin},
		{"POST", "/plugins/create", 0, pluginsUnsupported},
		{"GET", "/plugins/{name}/json", 0, noPlugin},
		{"DELETE", "/plugins/{name}", 0, noPlugin},
		{"POST", "/plugins/{name}/enable", 0, noPlugin},
		{"POST", "/plugins/{name}/disable", 0, noPlugin},
		{"POST", "/plugins/{name}/upgrade", 26, changePlugin},
		{"POST", "/plugins/{name}/push", 0, noPlugin},
		{"POST", "/plugins/{name}/set", 0, changePlugin},

		{"GET", "/swarm", 0, noManager},
		{"GET", "/swarm/unlockkey", 0, noManager},
		{"POST", "/swarm/init", 0, noSwarmMode},
		{"POST", "/swarm/join", 0, noSwarmMode},
		{"POST", "/swarm/leave", 0, notInSwarm},
		{"POST", "/swarm/update", 0, noManager},
		{"POST", "/swarm/unlock", 0, noManager},
		{"GET", "/nodes", 0, noManager},
		{"GET", "/nodes/{id}", 0, noManager},
		{"DELETE", "/nodes/{id}", 0, noManager},
		{"POST", "/nodes/{id}/update", 0, noManager},
		{"GET", "/services", 0, noManager},
		{"POST", "/services/create", 0, noManager},
		{"GET", "/services/{id}", 0, noManager},
		{"DELETE", "/services/{id}", 0, noManager},
		{"POST", "/services/{id}/update", 0, noManager},
		{"GET", "/services/{id}/logs", 0, noManager},
		{"GET", "/tasks", 0, noManager},
		{"GET", "/tasks/{id}", 0, noManager},
		{"GET", "/tasks/{id}/logs", 0, noManager},
		{"GET", "/secrets", 25, noManager},
		{"POST", "/secrets/create", 25, noManager},
		{"GET", "/secrets/{id}", 25, noManager},
		{"DELETE", "/secrets/{id}", 25, noManager},
		{"POST", "/secrets/{id}/update", 25, noManager},
		{"GET", "/configs", 30, noManager},
		{"POST", "/configs/create", 30, noManager},
		{"GET", "/configs/{id}", 30, noManager},
		{"DELETE", "/configs/{id}", 30, noManager},
		{"POST", "/configs/{id}/update", 30, noManager},

		{"POST", "/servin/run", 0, own.run},
		{"POST", "/servin/containers/{id}/exec", 0, own.exec},
		{"GET", "/servin/health", 0, own.health},
		{"GET", "/servin/doctor", 0, own.doctor},
		{"POST", "/servin/doctor/fix", 0, own.fix},
		{"GET", "/servin/drained", 0, own.drained},
		{"POST", "/servin/prune", 0, own.prune},
		{"POST", "/servin/shutdown", 0, own.shutdown},
		{"POST", "/servin/lease", 0, lse.hold},
		{"GET", "/servin/volumes/{id}/backup", 0, cpy.backup},
		{"GET", "/servin/volumes/{id}/export", 0, cpy.export},
		{"POST", "/servin/volumes/{id}/restore", 0, cpy.restore},
		{"POST", "/servin/volumes/{id}/import", 0, cpy.imports},
		{"POST", "/servin/volumes/{id}/clone", 0, cpy.clone},
		{"POST", "/servin/containers/{id}/checkpoint", 0, chk.stream},
		{"POST", "/servin/containers/{id}/restore", 0, chk.restore},
		{"POST", "/servin/checkpoints/import", 0, chk.imports},
		{"GET", "/servin/alerts", 0, alerts.list},
		{"POST", "/servin/alerts/{id}/test", 0, alerts.test},
		{"GET", "/servin/secrets", 0, sec.list},
		{"POST", "/servin/secrets", 0, sec.create},
		{"POST", "/servin/secrets/unlock", 0, sec.unlock},
		{"POST", "/servin/secrets/lock", 0, sec.lock},
		{"POST", "/servin/secrets/rotate-key", 0, sec.rekey},
		{"GET", "/servin/secrets/{id}", 0, sec.inspect},
		{"POST", "/servin/secrets/{id}/update", 0, sec.update},
		{"DELETE", "/servin/secrets/{id}", 0, sec.remove},
		{"GET", "/servin/configs", 0, cnf.list},
		{"POST", "/servin/configs", 0, cnf.create},
		{"GET", "/servin/configs/{id}", 0, cnf.inspect},
		{"POST", "/servin/configs/{id}/update", 0, cnf.update},
		{"DELETE", "/servin/configs/{id}", 0, cnf.remove},
		{"GET", "/servin/signatures", 0, img.signatures},
		{"GET", "/servin/debug-shell", 0, dbg.show},
		{"POST", "/servin/debug-shell", 0, dbg.enable},
		{"DELETE", "/servin/debug-shell", 0, dbg.disable},
		{"POST", debugShellRun, 0, own.run},
		{"DELETE", "/servin/debug-shell/{id}", 0, dbg.end},
		{"GET", "/servin/policy", 0, pol.show},
		{"POST", "/servin/policy/reload", 0, pol.reload},
		{"POST", "/servin/policy/check", 0, pol.check},
		{"POST", "/servin/policy/test", 0, pol.test},
		{"GET", "/servin/audit", 0, adt.read},
		{"GET", "/servin/audit/verify", 0, adt.verify},
		{"GET", "/servin/os/status", 0, system.pass},
		{"POST", "/servin/os/upgrade", 0, system.pass},
		{"POST", "/servin/os/rollback", 0, system.pass},
		{"POST", "/servin/os/reboot", 0, system.pass},
		{"GET", "/servin/os/config", 0, system.pass},
		{"PUT", "/servin/os/config", 0, system.pass},
		{"POST", "/servin/os/recovery", 0, system.pass},
		{"GET", "/servin/os/log", 0, system.log},
		{"GET", "/metrics", 0, own.metrics},
	}
}

// Route is one line of the route table, for documents made of it.
type Route struct{ Method, Pattern, Since string }

// Routes lists the route table. Since is empty where every version has the route.
func Routes() []Route {
	table := routes(Config{})
	out := make([]Route, 0, len(table))
	for _, r := range table {
		since := ""
		if r.since > 0 {
			since = r.since.String()
		}
		out = append(out, Route{r.method, r.pattern, since})
	}
	return out
}
