package cri

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// podOf is a pod as an API server gives it to a kubelet, with the defaults filled
// in. Its name ends with that of the node, as static pods' do.
func podOf(name, spec, container string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"%s-node","namespace":"default","labels":{"app":"%[1]s"}},
"spec":{"nodeName":"node","restartPolicy":"Never","terminationGracePeriodSeconds":5,"dnsPolicy":"ClusterFirst","schedulerName":"default-scheduler","securityContext":{},
"serviceAccountName":"default","enableServiceLinks":true,%s
"containers":[{"name":"c","image":"%s","imagePullPolicy":"Never","terminationMessagePath":"/dev/termination-log","terminationMessagePolicy":"File",%s}]},
"status":{"phase":"Pending"}}`, name, spec, image, container)
}

const podsPath = "/api/v1/namespaces/default/pods"

// TestNode runs a kubelet that is a member of a cluster: what a stand-alone one
// cannot do is to be shown here. Projected volumes with tokens, secrets and
// configuration; eviction of pods; deletion with grace.
func TestNode(t *testing.T) {
	a := newAPIServer(t)
	n := newNode(t, true)
	n.stopKubelet()
	n.extra = "contentType: application/json\nconfigMapAndSecretChangeDetectionStrategy: Get\n"
	n.flags = []string{"--kubeconfig", a.kubeconfig(t, n.dir)}
	a.put("/api/v1/namespaces/default/configmaps", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"conf","namespace":"default"},"data":{"color":"green","file":"text\n"}}`)
	a.put("/api/v1/namespaces/default/secrets", `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"secret","namespace":"default"},"data":{"key":"aHVzaA=="}}`)
	n.startKubelet()
	eventually(t, "the node's registration", func() error {
		if a.get("/api/v1/nodes/node") == nil {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	t.Cleanup(func() {
		for _, name := range []string{"projected", "evicted", "layer", "deleted"} {
			if a.get(podsPath+"/"+name+"-node") != nil {
				deletePod(t, a, name, 1)
			}
		}
		for _, name := range []string{"projected", "evicted", "layer", "deleted"} {
			eventually(t, "the end of "+name, func() error {
				if a.get(podsPath+"/"+name+"-node") != nil {
					return fmt.Errorf("it is there")
				}
				return nil
			})
		}
	})

	t.Run("projected", func(t *testing.T) {
		a.put(podsPath, podOf("projected", `"volumes":[{"name":"p","projected":{"defaultMode":416,"sources":[
{"serviceAccountToken":{"path":"token","expirationSeconds":3600}},
{"configMap":{"name":"conf","items":[{"key":"file","path":"conf/file"}]}},
{"secret":{"name":"secret"}},
{"downwardAPI":{"items":[{"path":"labels","fieldRef":{"apiVersion":"v1","fieldPath":"metadata.labels"}}]}}]}}],`,
			`"command":["sleep","1000"],"volumeMounts":[{"name":"p","mountPath":"/p","readOnly":true}],
"env":[{"name":"COLOR","valueFrom":{"configMapKeyRef":{"name":"conf","key":"color"}}},{"name":"KEY","valueFrom":{"secretKeyRef":{"name":"secret","key":"key"}}}]`))
		n.wait(t, "projected", "ready", ready)
		for script, want := range map[string]string{
			"cat /p/token":                          "token-of-default",
			"cat /p/conf/file":                      "text",
			"cat /p/key":                            "hush",
			"cat /p/labels":                         `app="projected"`,
			"stat -L -c %a /p/key":                  "640",
			"echo $COLOR $KEY":                      "green hush",
			"grep -c ' /p tmpfs' /proc/mounts":      "1",
			"touch /p/x 2>/dev/null || echo no":     "no",
			"cat /p/..data/key; ls /p | wc -l":      "hush4",
			"echo $KUBERNETES_SERVICE_HOST | wc -w": "0",
		} {
			if got := n.sh(t, "projected", "c", script); got != want {
				t.Errorf("%s: %q, want %q", script, got, want)
			}
		}
	})
	t.Run("eviction", func(t *testing.T) {
		a.put(podsPath, podOf("evicted", `"volumes":[{"name":"v","emptyDir":{"sizeLimit":"1Mi"}}],`,
			`"command":["sh","-c","dd if=/dev/zero of=/v/big bs=1M count=8; sleep 1000"],"volumeMounts":[{"name":"v","mountPath":"/v"}]`))
		// This one is by the figures of the engine: what a container's layer takes.
		a.put(podsPath, podOf("layer", "", `"command":["sh","-c","dd if=/dev/zero of=/big bs=1M count=8; sleep 1000"],"resources":{"limits":{"ephemeral-storage":"1Mi"},"requests":{"ephemeral-storage":"1Mi"}}`))
		for _, name := range []string{"evicted", "layer"} {
			p := n.wait(t, name, "evicted", func(p corev1.Pod) bool { return p.Status.Phase == corev1.PodFailed })
			if p.Status.Reason != "Evicted" {
				t.Errorf("%s: %+v", name, p.Status)
			}
			eventually(t, "the end of its containers", func() error {
				for _, r := range n.running() {
					if strings.HasPrefix(r, name) {
						return fmt.Errorf("%s runs", r)
					}
				}
				return nil
			})
		}
	})
	t.Run("deletion", func(t *testing.T) {
		a.put(podsPath, podOf("deleted", "", `"command":["sh","-c","trap 'sleep 1; exit 0' TERM; while :; do sleep 0.1; done"]`))
		n.wait(t, "deleted", "ready", ready)
		deletePod(t, a, "deleted", 5)
		eventually(t, "its end", func() error {
			if a.get(podsPath+"/deleted-node") != nil {
				return fmt.Errorf("it is there")
			}
			return nil
		})
	})
}

// deletePod asks the API server to delete a pod, as kubectl does.
func deletePod(t *testing.T, a *apiServer, name string, grace int) {
	t.Helper()
	q, err := http.NewRequest(http.MethodDelete, a.url+podsPath+"/"+name+"-node", strings.NewReader(fmt.Sprintf(`{"gracePeriodSeconds":%d}`, grace)))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}
