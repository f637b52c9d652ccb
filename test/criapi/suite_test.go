package criapi

import "testing"

// TestSuite runs what needs no daemon of its own on one daemon, at the same time.
func TestSuite(t *testing.T) {
	n := start(t)
	for name, f := range map[string]func(*testing.T, *node){
		"pod attributes":       podAttributes,
		"pod lists":            podLists,
		"invalid pods":         invalidPods,
		"missing objects":      missingObjects,
		"container lists":      containerLists,
		"container status":     containerStatus,
		"invalid containers":   invalidContainers,
		"exit and reasons":     exitAndReasons,
		"exec":                 execSync,
		"command and args":     commandAndArgs,
		"logs":                 logs,
		"volumes":              volumes,
		"propagation":          propagation,
		"read-only mounts":     readOnlyMounts,
		"namespaces":           namespaces,
		"host network":         hostNetwork,
		"shared processes":     sharedProcesses,
		"dns and hosts":        dnsAndHosts,
		"sysctls":              sysctls,
		"ports":                ports,
		"users and groups":     usersAndGroups,
		"capabilities":         capabilities,
		"privileged":           privileged,
		"seccomp":              seccomp,
		"paths":                paths,
		"no new privileges":    noNewPrivileges,
		"user namespaces":      userNamespaces,
		"resources":            resources,
		"update":               update,
		"signals":              signals,
		"devices":              devices,
		"streams":              streams,
		"port forward":         portForward,
		"images":               images,
		"image volumes":        imageVolumes,
		"stats":                stats,
		"metrics":              metrics,
		"runtime":              runtimeInfo,
		"events":               events,
		"streamed lists":       streamedLists,
		"old version":          oldVersion,
		"apart from the plain": apart,
		"unsupported":          unsupported,
	} {
		t.Run(name, func(t *testing.T) {
			f(t, n)
		})
	}
}
