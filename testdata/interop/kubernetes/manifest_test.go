// Package kubernetes checks the manifest of the documentation against the
// types of Kubernetes' own API.
package kubernetes

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"sigs.k8s.io/yaml"
)

func TestDaemonSet(t *testing.T) {
	doc, err := os.ReadFile("../../../docs/containers.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile("(?ms)^```yaml\n(.*?)^```$").FindSubmatch(doc)
	if m == nil {
		t.Fatal("docs/containers.md has no manifest")
	}
	var set appsv1.DaemonSet
	if err := yaml.UnmarshalStrict(m[1], &set); err != nil { // which knows no other fields
		t.Fatal(err)
	}
	if set.APIVersion != "apps/v1" || set.Kind != "DaemonSet" {
		t.Fatalf("it is a %s of %s", set.Kind, set.APIVersion)
	}
	if set.Spec.Selector.MatchLabels["app"] != set.Spec.Template.Labels["app"] {
		t.Error("the selector does not select the pods")
	}
	update := set.Spec.UpdateStrategy
	if update.Type != appsv1.RollingUpdateDaemonSetStrategyType || update.RollingUpdate.MaxSurge.IntValue() != 1 || update.RollingUpdate.MaxUnavailable.IntValue() != 0 {
		t.Errorf("the update strategy is %+v; want a surge of one pod, and none unavailable", update)
	}
	pod := set.Spec.Template.Spec
	if !pod.HostNetwork {
		t.Error("the pods are not on the host's network")
	}
	c := pod.Containers[0]
	if len(pod.Containers) != 1 || len(c.Ports) != 0 {
		t.Errorf("%d containers, with ports %v; want one without", len(pod.Containers), c.Ports)
	}
	volumes := map[string]bool{}
	for _, v := range pod.Volumes {
		volumes[v.Name] = v.HostPath != nil || v.EmptyDir != nil
	}
	for _, v := range c.VolumeMounts {
		if !volumes[v.Name] {
			t.Errorf("there is no volume %q", v.Name)
		}
	}
	words := strings.Fields(c.Args[0])
	flag := func(name string) string {
		t.Helper()
		for i, w := range words[:len(words)-1] {
			if w == name {
				return words[i+1]
			}
		}
		t.Fatalf("the command has no %s", name)
		return ""
	}
	seconds := func(name string) int64 {
		t.Helper()
		d, err := time.ParseDuration(flag(name))
		if err != nil {
			t.Fatal(err)
		}
		return int64(d / time.Second)
	}
	if n := seconds("-probation"); int64(set.Spec.MinReadySeconds) <= n {
		t.Errorf("minReadySeconds is %d; want more than the probation, %d", set.Spec.MinReadySeconds, n)
	}
	if n := seconds("-drain"); *pod.TerminationGracePeriodSeconds <= n {
		t.Errorf("terminationGracePeriodSeconds is %d; want more than the drain, %d", *pod.TerminationGracePeriodSeconds, n)
	}
	probe := c.ReadinessProbe
	if probe.TCPSocket != nil || probe.Exec == nil || probe.Exec.Command[2] != flag("-pidfile") {
		t.Errorf("the readiness probe is %+v; want one of the PID file", probe)
	}
	if flag("-unit") != `"$POD_UID"` || c.Env[0].Name != "POD_UID" || c.Env[0].ValueFrom.FieldRef.FieldPath != "metadata.uid" {
		t.Error("the unit is not the pod's UID")
	}
}
